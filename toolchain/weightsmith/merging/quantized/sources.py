"""Sources of computed weights: dequantized ones, and 16-bit ones rounded to 4 bits."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from weightsmith.merging.outputs import Files, StoredTensor, TensorSource
from weightsmith.merging.quantized.packed import Packed
from weightsmith.models.safetensors import BITS

if TYPE_CHECKING:
    import numpy as np


_BYTES = 20
"""Bytes per element while dequantizing: codes, expanded scales and products in 32 bits, and the
result, of which two are kept."""


class DecodedSource(ABC):
    """A weight that is computed whole and kept, so that rows can be read from it."""

    @abstractmethod
    def make(self, files: Files) -> np.ndarray:
        """Compute the whole weight."""

    @property
    @abstractmethod
    def held_bytes(self) -> int:
        """Memory that computing it takes; the last two are kept."""

    def rows(self, files: Files, first: int, count: int, columns: int) -> np.ndarray:
        """Return rows of the tensor viewed as a matrix with `columns` columns, in its own dtype."""
        whole = files.once(self, lambda: self.make(files))
        return whole.reshape(-1, columns)[first : first + count]


@dataclass(frozen=True, kw_only=True, eq=False)
class Decoded(DecodedSource):
    """A weight stored as codes and scales."""

    weight: Packed
    parts: Mapping[str, StoredTensor]

    @property
    def dtype(self) -> str:
        """The safetensors dtype of the values."""
        return self.weight.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape."""
        return self.weight.shape

    @property
    def held_bytes(self) -> int:
        """Memory that dequantizing takes."""
        return _BYTES * math.prod(self.shape)

    def make(self, files: Files) -> np.ndarray:
        """Return the dequantized weight."""
        from weightsmith.merging.quantized.decode import decode

        parts = {
            part: files.array(stored.path, stored.info)
            for part, stored in self.parts.items()
            if part not in ("state", "shape", "format")
        }
        return decode(self.weight, parts)


@dataclass(frozen=True, kw_only=True, eq=False)
class RoundedToNf4(DecodedSource):
    """A 16-bit weight rounded to NF4 and back."""

    source: StoredTensor
    double: bool

    @property
    def dtype(self) -> str:
        """The safetensors dtype of the values."""
        return self.source.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape."""
        return self.source.shape

    @property
    def held_bytes(self) -> int:
        """Memory that the round trip takes: input and output, of which two are kept."""
        return 4 * math.prod(self.shape) * BITS[self.dtype] // 8

    def make(self, files: Files) -> np.ndarray:
        """Return the rounded weight."""
        from weightsmith.merging.quantized.nf4 import round_trip

        return round_trip(files.array(self.source.path, self.source.info), double=self.double)


def held_bytes(source: TensorSource) -> int:
    """Return the memory that a source takes in addition to the blocks that it returns."""
    return source.held_bytes if isinstance(source, DecodedSource) else 0
