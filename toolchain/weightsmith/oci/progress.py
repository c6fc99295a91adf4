"""Counts bytes from several threads for one callback."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TypeAlias

Advance: TypeAlias = Callable[[int, int], None]
"""Called with bytes done and total bytes; from any thread, never from two at once."""


class Meter:
    """Sums up the progress of pieces, each of which may start over."""

    def __init__(self, total: int, advance: Advance | None = None) -> None:
        self._total = total
        self._advance = advance
        self._pieces: dict[object, int] = {}
        self._done = 0
        self._lock = threading.Lock()

    def reach(self, piece: object, done: int) -> None:
        """Set how many bytes of a piece are done."""
        with self._lock:
            self._done += done - self._pieces.get(piece, 0)
            self._pieces[piece] = done
            if self._advance:
                self._advance(self._done, self._total)

    def counted(self, piece: object, chunks: Iterable[bytes]) -> Iterator[bytes]:
        """Pass a piece's chunks on and count them, starting at 0."""
        done = 0
        for chunk in chunks:
            yield chunk
            done += len(chunk)
            self.reach(piece, done)
