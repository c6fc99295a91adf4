"""Reads a running program's output line by line, on the caller's thread, until told to stop."""

from __future__ import annotations

import os
import selectors
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO

Listener = Callable[[str], None]

LONGEST = 1 << 20
"""Bytes of a line for people; a longer one is split."""
RESULT = 512 << 20
"""Bytes of a line with a worker's result: it has all answers to an evaluation's questions."""
_CHUNK = 1 << 16
_TURN = 3600.0


class Lines:
    """Splits bytes into lines; a carriage return also ends one, as in progress bars."""

    def __init__(self, longest: int = LONGEST) -> None:
        self._longest = longest
        self._rest = bytearray()

    def feed(self, chunk: bytes) -> list[str]:
        """Return the lines now complete; an empty chunk ends the last one."""
        first, *others = chunk.replace(b"\r", b"\n").split(b"\n")
        # In place: copying the buffer with each chunk would take minutes for a long line.
        self._rest += first
        whole = []
        for piece in others:
            whole.append(self._line())
            self._rest += piece
        # An endless line must not grow without limit.
        if not chunk or len(self._rest) > self._longest:
            whole.append(self._line())
        return [line for line in whole if line]

    def _line(self) -> str:
        line = self._rest.decode(errors="replace")
        self._rest = bytearray()
        return line


def pump(
    pid: int,
    streams: list[tuple[IO[bytes], Lines, Listener]],
    deadline: float | None,
    on_exit: Callable[[], None],
    stop: int | None = None,
) -> None:
    """Pass on each stream's lines until the process has ended and its output is read.

    `on_exit` is called when the process has ended, before the rest is read: it must end remaining
    children, because they keep the pipes open. Raises TimeoutError at `deadline` (of
    `time.monotonic`), InterruptedError as soon as the file `stop` can be read, and whatever the
    listeners raise.
    """
    watch = os.pidfd_open(pid)
    try:
        with selectors.DefaultSelector() as selector:
            selector.register(watch, selectors.EVENT_READ, None)
            for stream, lines, listener in streams:
                selector.register(stream, selectors.EVENT_READ, (lines, listener))
            if stop is not None:
                selector.register(stop, selectors.EVENT_READ, None)
            while len(selector.get_map()) > (stop is not None):
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    raise TimeoutError
                # In steps: epoll's longest timeout is 24 days.
                for key, _ in selector.select(_TURN if left is None else min(left, _TURN)):
                    if key.fd == stop:
                        raise InterruptedError
                    if key.data is None:
                        on_exit()
                        selector.unregister(watch)
                        continue
                    lines, listener = key.data
                    chunk = os.read(key.fd, _CHUNK)
                    for line in lines.feed(chunk):
                        listener(line)
                    if not chunk:
                        selector.unregister(key.fileobj)
    finally:
        os.close(watch)
        for stream, *_ in streams:
            stream.close()


@contextmanager
def when_readable(file: int | None, act: Callable[[], None]) -> Iterator[None]:
    """During the block, call `act` on a thread once an open file can be read; None for no file."""
    if file is None:
        yield
        return
    over = os.eventfd(0)

    def watch() -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(over, selectors.EVENT_READ)
            selector.register(file, selectors.EVENT_READ)
            if over not in {key.fd for key, _ in selector.select()}:
                act()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        os.eventfd_write(over, 1)
        watcher.join()
        os.close(over)
