"""A tensor whose rows are computed when they are indexed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch

from weightsmith.models.safetensors import TensorInfo
from weightsmith.models.virtual_weights import Data

_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class LazyRows:
    """Stands for a stored tensor where only rows of it are read."""

    def __init__(self, data: Data, info: TensorInfo) -> None:
        """Raise KeyError for a dtype that no merged weight has."""
        self._data, self._info = data, info
        self.shape, self.dtype = torch.Size(info.shape), _TYPES[info.dtype]
        self._row = info.size // info.shape[0] if math.prod(info.shape) else 0

    def __len__(self) -> int:
        """Return the number of rows."""
        return self.shape[0]

    def __getitem__(self, rows: slice | torch.Tensor) -> torch.Tensor:
        """Return rows in the file's dtype: a slice without step, or the rows of an index."""
        if isinstance(rows, torch.Tensor):
            found = [self._read(row, row + 1) for row in rows.tolist()]
            return torch.cat(found) if found else torch.empty((0, *self.shape[1:])).to(self.dtype)
        first, last, _ = rows.indices(len(self))
        return self._read(first, max(first, last))

    def part(self, number: int) -> LazyRows:
        """Return one matrix of a stack."""
        start = self._info.start + number * self._row
        shape, end = self._info.shape[1:], start + self._row
        return LazyRows(self._data, replace(self._info, shape=shape, start=start, end=end))

    def whole(self) -> torch.Tensor:
        """Return the whole tensor."""
        return self[:] if self.shape else self._as_tensor(0, self._info.size).reshape(())

    def split(self, size: int, dim: int = 0) -> Iterator[torch.Tensor]:
        """Yield the rows, so many at a time; called by torch.split."""
        if dim:
            raise ValueError("only rows can be split")
        for first in range(0, len(self), size):
            yield self[first : first + size]

    def _read(self, first: int, last: int) -> torch.Tensor:
        flat = self._as_tensor(first * self._row, (last - first) * self._row)
        return flat.reshape(last - first, *self.shape[1:])

    def _as_tensor(self, start: int, size: int) -> torch.Tensor:
        if not size:
            return torch.empty(0, dtype=self.dtype)
        return torch.from_numpy(self._data.read(self._info.start + start, size)).view(self.dtype)
