"""Reads a running program's output by lines, on the caller's own thread."""

from __future__ import annotations

import os
import selectors
import time
from collections.abc import Callable
from typing import IO

Hear = Callable[[str], None]

LONGEST = 1 << 20
"""Bytes of a line that people read; a longer one comes in pieces."""
RESULT = 256 << 20
"""Bytes of a line that is a worker's result: all answers of an evaluation are in it."""
_CHUNK = 1 << 16
_TURN = 3600.0


class Lines:
    """Cuts bytes into lines; a carriage return ends one too, as progress bars use it."""

    def __init__(self, longest: int = LONGEST) -> None:
        self._longest = longest
        self._rest = bytearray()

    def feed(self, chunk: bytes) -> list[str]:
        """Return the lines that are now complete; an empty chunk ends the last one."""
        first, *others = chunk.replace(b"\r", b"\n").split(b"\n")
        # In place: a copy of what is held with each chunk would take minutes for a long line.
        self._rest += first
        whole = []
        for piece in others:
            whole.append(self._taken())
            self._rest += piece
        # A line without an end must not grow for ever.
        if not chunk or len(self._rest) > self._longest:
            whole.append(self._taken())
        return [line for line in whole if line]

    def _taken(self) -> str:
        line = self._rest.decode(errors="replace")
        self._rest = bytearray()
        return line


def pump(
    pid: int,
    streams: list[tuple[IO[bytes], Lines, Hear]],
    deadline: float | None,
    on_exit: Callable[[], None],
) -> None:
    """Hand on each stream's lines until the process ended and all its output is read.

    `on_exit` is called once the process has ended, before the rest is read: it must end children
    that were left behind, because they hold the pipes open. Raises TimeoutError at `deadline`
    (of `time.monotonic`), and whatever the listeners raise.
    """
    watch = os.pidfd_open(pid)
    try:
        with selectors.DefaultSelector() as selector:
            selector.register(watch, selectors.EVENT_READ, None)
            for stream, lines, hear in streams:
                selector.register(stream, selectors.EVENT_READ, (lines, hear))
            while selector.get_map():
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    raise TimeoutError
                # In turns: epoll takes no more than 24 days at once.
                for key, _ in selector.select(_TURN if left is None else min(left, _TURN)):
                    if key.data is None:
                        on_exit()
                        selector.unregister(watch)
                    elif not _read(key.fd, *key.data):
                        selector.unregister(key.fileobj)
    finally:
        os.close(watch)
        for stream, *_ in streams:
            stream.close()


def _read(source: int, lines: Lines, hear: Hear) -> bool:
    """Hand on what there is; False at the end of the stream."""
    chunk = os.read(source, _CHUNK)
    for line in lines.feed(chunk):
        hear(line)
    return bool(chunk)
