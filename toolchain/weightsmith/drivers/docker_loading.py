"""Gives image archives to the engine so that, interrupted, an image is there or it is not."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import docker

from weightsmith.errors import EnvironmentFailure

LAST_SECONDS = 15.0
"""How long an interrupted command waits for an engine that unpacks an image already."""

_NOT_UNPACKED = "Error unpacking image"


def load_in_turn(
    connect: Callable[[], docker.DockerClient],
    archives: Iterable[Iterator[bytes]],
    reference: str,
    abreast: int = 1,
) -> None:
    """Send archives of which each rests on the layers of the one before; some at a time.

    `abreast` of them are sent at once while the engine unpacks one, as in a pull, so that its disk
    holds those instead of all. Raises EnvironmentFailure for what it refuses.
    """
    begun: list[Taking] = []
    try:
        for archive in archives:
            begun.append(Taking(connect, archive, reference, begun[-1] if begun else None))
            if len(begun) >= abreast:
                begun[-abreast].wait_until_sent()
            for before in begun[:-abreast]:
                before.finish()
            del begun[:-abreast]
        for last in begun:
            last.finish()
    except BaseException:
        for taking in begun:
            taking.stop()
        for taking in begun:
            taking.give_up()
        raise


class Taking(threading.Thread):
    """Sends an archive beside the main thread, which alone is interrupted.

    Its last chunk, without which the engine does not look at what came, waits for `before`.
    """

    def __init__(
        self,
        connect: Callable[[], docker.DockerClient],
        archive: Iterator[bytes],
        reference: str,
        before: Taking | None = None,
    ) -> None:
        super().__init__(daemon=True)
        self._connect, self._archive, self._reference = connect, archive, reference
        self._before = before
        self._given_up = threading.Event()
        self._sent = threading.Event()
        self._ended = threading.Event()
        """Set at the end: an interrupted `join` takes the thread for ended (Python 3.11, 3.12)."""
        self._problem: BaseException | None = None
        self.start()

    def run(self) -> None:
        """Send it all, and listen to what the engine says of it."""
        try:
            with contextlib.closing(self._connect()) as client:
                api: Any = client.api
                for told in api.load_image(self._chunks()):
                    self._hear(told)
        except BaseException as problem:  # noqa: BLE001 - raised again by who waits for it
            self._problem = problem
        finally:
            self._before = None  # or each would keep all that came before it
            self._sent.set()
            self._ended.set()

    def _hear(self, told: Mapping[str, str]) -> None:
        # Docker 28 with images in containerd names an image that it could not unpack, and says so
        # among its other lines (daemon/containerd/image_exporter.go).
        said = told.get("stream", "").strip()
        problem = told.get("error") or (said if said.startswith(_NOT_UNPACKED) else "")
        if problem:
            raise EnvironmentFailure(
                f"the container engine did not take {self._reference}: {problem}",
                hint="see its free disk space with `docker system df`",
            )

    def _chunks(self) -> Iterator[bytes]:
        kept = b""
        for chunk in self._archive:
            self._check()
            if self._before is None:
                yield chunk
                continue
            if kept:
                yield kept
            kept = chunk
        self._sent.set()
        if self._before is not None:
            self._before.finish()
            self._check()
            yield kept

    def _check(self) -> None:
        if self._given_up.is_set():
            raise ConnectionError("given up")  # the engine drops what is not whole

    def wait_until_sent(self) -> None:
        """Wait until all but the last chunk is sent, or until it failed."""
        self._sent.wait()

    def finish(self) -> None:
        """Wait for the end; raises what went wrong."""
        self._ended.wait()
        if self._problem is not None:
            raise self._problem

    def stop(self) -> None:
        """Send no more."""
        self._given_up.set()

    def give_up(self) -> None:
        """Send no more, and wait until the engine has dropped it or, with all of it, is done."""
        self.stop()
        self._ended.wait(LAST_SECONDS)
