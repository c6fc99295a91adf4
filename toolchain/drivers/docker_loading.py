"""Gives an image archive to the engine so that, interrupted, it is there or it is not."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import docker

from toolchain.errors import EnvironmentFailure

LAST_SECONDS = 15.0
"""How long an interrupted command waits for an engine that unpacks an image already."""


class Taking(threading.Thread):
    """Sends an archive beside the main thread, which alone is interrupted."""

    def __init__(
        self, connect: Callable[[], docker.DockerClient], archive: Iterator[bytes], reference: str
    ) -> None:
        super().__init__(daemon=True)
        self._connect, self._archive, self._reference = connect, archive, reference
        self._given_up = threading.Event()
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
                    if "error" in told:
                        raise EnvironmentFailure(
                            f"the container engine did not take {self._reference}: {told['error']}",
                            hint="see its free disk space with `docker system df`",
                        )
        except BaseException as problem:  # noqa: BLE001 - raised again by who waits for it
            self._problem = problem
        finally:
            self._ended.set()

    def _chunks(self) -> Iterator[bytes]:
        for chunk in self._archive:
            if self._given_up.is_set():
                raise ConnectionError("given up")  # the engine drops what is not whole
            yield chunk

    def finish(self) -> None:
        """Wait for the end; raises what went wrong."""
        self._ended.wait()
        if self._problem is not None:
            raise self._problem

    def give_up(self) -> None:
        """Send no more, and wait until the engine has dropped it or, with all of it, is done."""
        self._given_up.set()
        self._ended.wait(LAST_SECONDS)
