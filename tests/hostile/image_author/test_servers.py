"""A started image's server gives answers that never end."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest
from weightsmith.errors import CheckFailed
from weightsmith.evaluating import client
from weightsmith.evaluating.client import wait_until_healthy
from weightsmith.evaluating.session import ServerSession, SessionLimits
from weightsmith.ports import Endpoint


def drips_headers(caller: socket.socket) -> None:
    caller.sendall(b"HTTP/1.1 200 OK\r\nX: ")
    while True:
        caller.sendall(b"x")
        time.sleep(0.02)


def never_ends_its_body(caller: socket.socket) -> None:
    caller.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        caller.sendall(b"x" * 65536)


@contextmanager
def serving(answer: Callable[[socket.socket], None]) -> Iterator[Endpoint]:
    """Answer each connection in a thread of its own until the context ends."""

    def attend(caller: socket.socket) -> None:
        with caller, suppress(OSError):
            caller.recv(65536)
            answer(caller)

    def accept(listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                caller, _ = listener.accept()
                threading.Thread(target=attend, args=(caller,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, args=(listener,), daemon=True).start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        yield Endpoint(url=url, logs=lambda _: "", alive=lambda: True)
        listener.shutdown(socket.SHUT_RDWR)


def test_a_server_whose_headers_never_end_is_given_up() -> None:
    """Each byte comes in time and the last never does: the question has one limit for all."""
    limits = SessionLimits(request_seconds=0.5, tries=1)

    with (
        serving(drips_headers) as endpoint,
        ServerSession(endpoint, limits) as session,
        pytest.raises(CheckFailed, match=r"0\.5 s"),
    ):
        session.get("/v1/models")


def test_a_server_whose_health_never_comes_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """It drips the headers of its health answer: the wait ends when its time is over."""
    monkeypatch.setattr(client, "_PROBE_SECONDS", 0.2)

    with serving(drips_headers) as endpoint, pytest.raises(CheckFailed, match=r"0\.5 s"):
        wait_until_healthy(endpoint, "/health", 0.5)


def test_a_server_is_healthy_whatever_its_health_answer_goes_on_to_say() -> None:
    """Its body has no end: the status is what counts, and nobody reads on."""
    with serving(never_ends_its_body) as endpoint:
        assert wait_until_healthy(endpoint, "/health", 60) < 60
