"""Loads image archives into the engine; an interrupt leaves an image loaded or not loaded.

Docker unpacks an archive only when it has all of it, and keeps both on disk. So each large layer is
sent as an image of its own, based on the previous one: its archive leaves out the lower layers, and
its last bytes are held back until those are loaded. An interrupted load goes on, since its
intermediate images have names. A read-only registry on loopback to pull from is no faster, and a
remote engine cannot reach it.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import docker

from weightsmith.core.errors import EnvironmentFailure

LAST_SECONDS = 15.0
"""Seconds that an interrupted command waits for an engine that is already unpacking."""

_NOT_UNPACKED = "Error unpacking image"


def load_in_order(
    connect: Callable[[], docker.DockerClient],
    archives: Iterable[Iterator[bytes]],
    reference: str,
    parallel: int = 1,
) -> None:
    """Send archives, each based on the layers of the previous one; several at a time.

    `parallel` of them are sent while the engine unpacks one, as in a pull, so its disk holds only
    those at a time. Raises EnvironmentFailure if the engine refuses one.
    """
    begun: list[ArchiveUpload] = []
    try:
        for archive in archives:
            begun.append(ArchiveUpload(connect, archive, reference, begun[-1] if begun else None))
            if len(begun) >= parallel:
                begun[-parallel].wait_until_sent()
            for before in begun[:-parallel]:
                before.finish()
            del begun[:-parallel]
        for last in begun:
            last.finish()
    except BaseException:
        for taking in begun:
            taking.stop()
        for taking in begun:
            taking.give_up()
        raise


class ArchiveUpload(threading.Thread):
    """Sends an archive on its own thread, since Ctrl-C interrupts only the main thread.

    The engine starts with the last chunk, so that one is held back until `before` is done.
    """

    def __init__(
        self,
        connect: Callable[[], docker.DockerClient],
        archive: Iterator[bytes],
        reference: str,
        before: ArchiveUpload | None = None,
    ) -> None:
        super().__init__(daemon=True)
        self._connect, self._archive, self._reference = connect, archive, reference
        self._before = before
        self._given_up = threading.Event()
        self._sent = threading.Event()
        self._ended = threading.Event()
        """Set at the end: an interrupted `join` treats the thread as ended (Python 3.11, 3.12)."""
        self._problem: BaseException | None = None
        self.start()

    def run(self) -> None:
        """Send the archive and read the engine's reply."""
        try:
            with contextlib.closing(self._connect()) as client:
                api: Any = client.api
                for line in api.load_image(self._chunks()):
                    self._check_line(line)
        except BaseException as problem:  # noqa: BLE001 - raised again by `finish`
            self._problem = problem
        finally:
            self._before = None  # else each would keep all previous ones in memory
            self._sent.set()
            self._ended.set()

    def _check_line(self, line: Mapping[str, str]) -> None:
        # Docker 28 with containerd's image store names an image even if unpacking failed, and
        # reports that among its other lines (daemon/containerd/image_exporter.go).
        output = line.get("stream", "").strip()
        problem = line.get("error") or (output if output.startswith(_NOT_UNPACKED) else "")
        if problem:
            raise EnvironmentFailure(
                f"the container engine did not load {self._reference}: {problem}",
                hint="check its free disk space with `docker system df`",
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
            raise ConnectionError("given up")  # the engine drops incomplete archives

    def wait_until_sent(self) -> None:
        """Wait until all but the last chunk is sent, or until it failed."""
        self._sent.wait()

    def finish(self) -> None:
        """Wait for the end; raises the error, if any."""
        self._ended.wait()
        if self._problem is not None:
            raise self._problem

    def stop(self) -> None:
        """Send no more."""
        self._given_up.set()

    def give_up(self) -> None:
        """Send no more, and wait until the engine has dropped the image or finished loading it."""
        self.stop()
        self._ended.wait(LAST_SECONDS)
