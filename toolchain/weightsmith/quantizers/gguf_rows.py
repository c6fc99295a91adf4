"""Rows of a tensor as float32, computed when they are read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from weightsmith.core.kernels import quants
from weightsmith.models.virtual_weights import computed

Read = Callable[[int, int], np.ndarray]
"""(first row, end) -> float32 [rows, columns], C-contiguous."""
STORED: dict[str, np.dtype[np.generic]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}
"""Array type of each float type; bfloat16 as bits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredRows:
    """Rows that lie in a file, or would if it had data."""

    path: Path
    kind: str
    """F32, F16 or BF16."""
    offset: int
    rows: int
    columns: int
    order: np.ndarray | None = field(default=None, compare=False)
    """Where each row lies in the file, if not one after the other: int64 [rows]."""

    def read(self, start: int, end: int) -> np.ndarray:
        """Return rows as float32; raises ValueError at the file's end.

        Rows that lie between those of another order are read, too.
        """
        if self.order is None:
            return self._stored(start, end)
        picked = self.order[start:end]
        first = int(picked.min())
        rows: np.ndarray = self._stored(first, int(picked.max()) + 1)[picked - first]
        return rows

    def _stored(self, start: int, end: int) -> np.ndarray:
        dtype, count = STORED[self.kind], (end - start) * self.columns
        at = self.offset + start * self.columns * dtype.itemsize
        if virtual := computed(self.path):
            data = virtual.read(at, count * dtype.itemsize).view(dtype)
        else:
            data = np.fromfile(self.path, dtype, count, offset=at)
        if len(data) != count:
            raise ValueError(f"{self.path.name} ends inside a tensor")
        return quants.widen(self.kind, data).reshape(-1, self.columns)


def joined(places: Sequence[StoredRows]) -> Read:
    """Return the rows of matrices of equal height, one after the other."""
    height = places[0].rows

    def read(start: int, end: int) -> np.ndarray:
        spans = [
            places[at].read(max(start - at * height, 0), min(end - at * height, height))
            for at in range(start // height, -(-end // height))
        ]
        return spans[0] if len(spans) == 1 else np.concatenate(spans)

    return read


def to_bfloat16(rows: np.ndarray) -> np.ndarray:
    """Return float32 rounded to bfloat16, halves to even, as float32; NaN stays NaN."""
    bits = rows.view(np.uint32)
    even = bits + (((bits >> np.uint32(16)) & np.uint32(1)) + np.uint32(0x7FFF))
    even &= np.uint32(0xFFFF0000)
    return np.where(np.isnan(rows), rows, even.view(np.float32))
