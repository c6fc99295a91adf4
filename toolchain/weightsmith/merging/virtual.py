"""Base and adapters seen as the merged checkpoint, whose rows are computed when they are read."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import cached_property

import numpy as np

from weightsmith.checkpoints.safetensors import BITS
from weightsmith.merging.blocks import RowMaker, Settings, Span, stored_copy
from weightsmith.merging.outputs import Output
from weightsmith.merging.plan import MergePlan
from weightsmith.merging.stream import as_bytes
from weightsmith.merging.tally import Tally


class VirtualCheckpoint:
    """The tensors that a merge would write, with the same bits.

    Rows may be read in any order and by several threads. `close` closes the input files.
    """

    def __init__(self, plan: MergePlan, settings: Settings) -> None:
        self._maker = RowMaker(settings, Tally())
        self.outputs = plan.outputs

    def tensor(self, name: str) -> VirtualTensor:
        """Return a tensor; it holds its factors while it is in use. Raises KeyError."""
        return VirtualTensor(self.outputs[name], self._maker)

    def close(self) -> None:
        """Close the input files."""
        self._maker.files.close()


class VirtualTensor:
    """One tensor, viewed as a matrix."""

    def __init__(self, output: Output, maker: RowMaker) -> None:
        self.output, self._maker, self._lock = output, maker, threading.Lock()
        self._last: tuple[int, np.ndarray] | None = None

    @property
    def row_bytes(self) -> int:
        """Bytes of a row as stored."""
        return self.output.columns * BITS[self.output.dtype] // 8

    def read(self, first: int, count: int) -> np.ndarray:
        """Return rows as they would lie in the file: uint8 [count, bytes per row].

        Raises InputRefused as the merge does, for NaN, infinity and overflow.
        """
        out = np.empty((count, self.row_bytes), np.uint8)
        if stored := stored_copy(self.output):
            reader = self._maker.files.reader(stored.path)
            return reader.read_into(out, stored.info.start + first * self.row_bytes)
        for span in self._spans:
            start, end = max(first, span.first), min(first + count, span.first + span.count)
            if start < end:
                for at, rows in self._rows(span, start, end):
                    data = np.frombuffer(as_bytes(rows), np.uint8).reshape(len(rows), -1)
                    out[at - first : at - first + len(rows)] = data
        return out

    @cached_property
    def _spans(self) -> tuple[Span, ...]:
        return tuple(self._maker.spans(self.output))

    def _rows(self, span: Span, start: int, end: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yield rows and where they begin; those of fixed blocks are cut from whole ones.

        The last of these is kept for the next call.
        """
        if not span.fixed:
            yield start, span.rows(start, end - start)
            return
        for first, count in span.blocks():
            if first < end and start < first + count:
                with self._lock:
                    if self._last is None or self._last[0] != first:
                        self._last = (first, span.rows(first, count))
                    block = self._last[1]
                cut = block[max(start - first, 0) : end - first]
                yield max(start, first), np.ascontiguousarray(cut)
