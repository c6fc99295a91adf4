"""A file's data in the order of the file, though they are read in another order.

A file of weights is hashed in this way by what reads them anyway; only what nothing else reads is
read for it. It costs 1.5 CPU seconds per billion weights, on a thread of its own. A digest per
tensor would be one more for the merge to compute; a cheaper sum, one more to keep, which no signed
statement names.
"""

from __future__ import annotations

import heapq
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from weightsmith.merging.stream import as_bytes

_WAITING = 8
"""Pieces between the readers and the thread that takes them in order."""
_EARLY = 32 << 20
"""Bytes that may wait for data before them; then these are read for their sake."""


class InOrder:
    """Gets the pieces that others read, and passes all data on, each byte once and in order.

    What nobody reads, or only much later, it reads itself.
    """

    def __init__(
        self,
        first: int,
        end: int,
        read: Callable[[int], np.ndarray],
        take: Callable[[memoryview], None],
    ) -> None:
        """Pass on the bytes from `first` to `end`; `read` returns some from an offset on."""
        self._next, self._end, self._read, self._pass_on = first, end, read, take
        self._early: list[tuple[int, int, np.ndarray]] = []
        self._held = self._count = 0
        self._error: BaseException | None = None
        self._room = threading.BoundedSemaphore(_WAITING)
        self._thread = ThreadPoolExecutor(1, "in-order")

    def see(self, start: int, data: np.ndarray) -> None:
        """Take what a reader has got: uint8, from an offset on; it must not change any more."""
        self._room.acquire()
        self._thread.submit(self._work, self._add, start, data)

    def finish(self) -> None:
        """Pass on what is left; raises what reading or taking raised."""
        self._thread.submit(self._work, self._complete)
        self._thread.shutdown()
        if self._error:
            raise self._error

    def abandon(self) -> None:
        """Stop."""
        self._thread.shutdown(cancel_futures=True)

    def _work(self, what: Callable[..., None], *given: object) -> None:
        try:
            if self._error is None:
                what(*given)
        except BaseException as error:  # noqa: BLE001 - raised by `finish`
            self._error = error
            self._early.clear()
        finally:
            if given:
                self._room.release()

    def _add(self, start: int, data: np.ndarray) -> None:
        self._count += 1  # no two entries compare their arrays
        heapq.heappush(self._early, (start, self._count, data))
        self._held += data.nbytes
        self._drain()
        while self._held > _EARLY:
            self._fill()

    def _complete(self) -> None:
        while self._next < self._end:
            self._fill()

    def _fill(self) -> None:
        self._pass(self._next, self._read(self._next))
        self._drain()

    def _drain(self) -> None:
        while self._early and self._early[0][0] <= self._next:
            start, _, data = heapq.heappop(self._early)
            self._held -= data.nbytes
            self._pass(start, data)

    def _pass(self, start: int, data: np.ndarray) -> None:
        if (new := data[self._next - start :]).size:
            self._pass_on(as_bytes(new))
            self._next += new.nbytes
