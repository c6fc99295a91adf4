"""Runs a job's container to its end, or until it is told to stop."""

from __future__ import annotations

import concurrent.futures
import contextlib
import threading
from collections.abc import Iterator, Mapping
from socket import SHUT_RDWR
from typing import Any

import docker
from docker.errors import APIError, DockerException
from docker.models.containers import Container
from docker.utils.socket import frames_iter
from requests.exceptions import RequestException

from weightsmith.core.errors import EnvironmentFailure
from weightsmith.outside.lines import RESULT, Lines, when_readable
from weightsmith.outside.process import TookTooLong
from weightsmith.outside.worker_protocol import Conversation

GONE = (DockerException, RequestException, OSError)
"""What the client library raises if the engine is not running or stops."""
ANSWER_SECONDS = 120
"""After which an engine that says nothing counts as gone."""
_NOT_STARTED = "waiting for init preliminary setup"
"""runc says so of a container that ended before its program: on a busy machine, now and then."""


def run_container(
    client: docker.DockerClient,
    request: Mapping[str, Any],
    conversation: Conversation,
    stop: int | None,
) -> int:
    """Start a job's container, process its output until it ends, and return its exit code.

    A container that the engine could not start is started once more. Raises TookTooLong after the
    job's time limit, InterruptedError once the open file `stop` can be read; the container is
    removed in any case.
    """
    try:
        return _run_once(client, request, conversation, stop)
    except APIError as problem:
        if _NOT_STARTED not in str(problem.explanation):
            raise
    return _run_once(client, request, conversation, stop)


def _run_once(
    client: docker.DockerClient,
    request: Mapping[str, Any],
    conversation: Conversation,
    stop: int | None,
) -> int:
    container = client.containers.create(**request)
    api: Any = client.api
    seconds = conversation.job.seconds
    patience = seconds + ANSWER_SECONDS if seconds else None
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        try:
            streams = {"stdin": 1, "stdout": 1, "stderr": 1, "stream": 1}
            socket = api.attach_socket(container.id, params=streams)
            with (
                contextlib.closing(socket),
                contextlib.closing(_raw_socket(socket)),
                _ended_early(seconds, stop, container, _raw_socket(socket)),
            ):
                # Attached before it starts: the container is removed as soon as it ends.
                ended = pool.submit(api.wait, container.id, patience, "removed")
                container.start()
                _read_output(socket, conversation)
                return int(ended.result()["StatusCode"])
        finally:
            remove(container)


@contextlib.contextmanager
def _ended_early(
    seconds: int, stop: int | None, container: Container, socket: Any
) -> Iterator[None]:
    """Remove the container after its time limit, and raise TookTooLong then; 0 for no limit.

    And once the file `stop` can be read, with InterruptedError.
    """
    why: list[Exception] = []

    def end(reason: Exception) -> None:
        why.append(reason)
        remove(container)
        # A hanging engine does not report the container's end; do not wait for it.
        with contextlib.suppress(*GONE):
            socket.shutdown(SHUT_RDWR)

    over = TookTooLong("the container exceeded its time limit", hint="see the job's log")
    timer = threading.Timer(seconds, end, [over])
    timer.daemon = True
    if seconds:
        timer.start()
    try:
        with when_readable(stop, lambda: end(InterruptedError())):
            yield
    except (*GONE, EnvironmentFailure):
        if not why:
            raise
    finally:
        timer.cancel()
    if why:
        raise why[0]


def _raw_socket(socket: Any) -> Any:
    """Return the socket below the client library's file, which does not close it."""
    return getattr(socket, "_sock", socket)


def _read_output(socket: Any, conversation: Conversation) -> None:
    listeners = {1: (Lines(RESULT), conversation.on_line), 2: (Lines(), conversation.on_error_line)}
    frames: Any = frames_iter
    for number, chunk in frames(socket, tty=False):
        lines, on_line = listeners.get(number, listeners[2])
        for line in lines.feed(chunk):
            on_line(line)
    for lines, on_line in listeners.values():
        for line in lines.feed(b""):
            on_line(line)


def remove(container: Container) -> None:
    """Remove a container, running or not; ignores one that is gone, even with its engine."""
    with contextlib.suppress(*GONE):
        container.remove(force=True, v=True)
