"""Rows of a quantized matrix whose codes share a scale per tile, read back to float32.

By a table of what each byte stands for, so that nothing is shared with what rounded them.

Measuring the error while codes are written would save a pass, but the check would believe what the
writer says about weights that it did not see.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from weightsmith.core.kernels import tiles
from weightsmith.models.tensors import array_type, widened

_FLOAT4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedTiles:
    """Codes and scales of rows; the first one begins a tile."""

    dtype: str
    """Safetensors dtype of the codes: F8_E4M3, I8, or U8 for two of float4_e2m1."""
    codes: npt.NDArray[np.uint8]
    """[rows, bytes]."""
    scales: npt.NDArray[np.float32]
    """What codes are multiplied by: [tiles of rows, tiles of columns]."""
    tile: tuple[int, int]
    """Rows and columns that share a scale."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        count, size = self.codes.shape
        return count, size * _values(self.dtype).shape[1]

    def rows(self) -> npt.NDArray[np.float32]:
        """Return what the codes stand for: float32 [rows, columns]."""
        (count, columns), (high, wide) = self.shape, self.tile
        # A pair of values is looked up as one number.
        table = _values(self.dtype)
        whole = table.view(np.complex64) if table.shape[1] == 2 else table
        found = whole[:, 0][self.codes].view(np.float32).reshape(count, columns)
        scales = np.repeat(self.scales, wide, 1)[:, :columns] if wide < columns else self.scales
        found *= np.repeat(scales, high, 0)[:count] if high > 1 else scales
        return found

    def squares(self, weights: npt.NDArray[np.generic]) -> tuple[float, float]:
        """Return the sums of squares of the codes' error and of the weights [rows, columns].

        Raises ValueError if the shapes differ, or a code stands for NaN or infinity.
        """
        if self.shape != weights.shape:
            raise ValueError(f"shape {self.shape}, not {weights.shape}")
        if tiles.reads(weights.dtype):
            table = _values(self.dtype)
            sums = tiles.compare_tiles(self.codes, table, self.scales, self.tile, weights)
        else:
            found, before = self.rows(), widened(weights)
            sums = None
            if np.isfinite(found).all():
                found -= before
                sums = float(np.vdot(found, found)), float(np.vdot(before, before))
        if sums is None:
            raise ValueError("NaN or infinite weights")
        return sums


@cache
def _values(dtype: str) -> npt.NDArray[np.float32]:
    """Return what each byte stands for: float32 [256, weights per byte], the low bits first."""
    codes = np.arange(256, dtype=np.uint8)
    if dtype != "U8":
        return np.asarray(codes.view(array_type(dtype)).astype(np.float32)[:, None])
    values = np.array([*_FLOAT4, *(-value for value in _FLOAT4)], np.float32)
    return np.ascontiguousarray(np.stack([values[codes & 15], values[codes >> 4]], 1))
