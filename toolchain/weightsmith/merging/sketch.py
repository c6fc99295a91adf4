"""What the proof of a merged tensor needs of the base: its rows projected onto random signs."""

from __future__ import annotations

import hashlib

import numpy as np

from weightsmith.merging import native
from weightsmith.merging.outputs import MergedTensor
from weightsmith.merging.rounding import F32, F64, round_once
from weightsmith.merging.stream import ARRAY_TYPES

_VECTORS = 2
"""Random vectors per tensor: a single one misses about one wrong row in a hundred."""


class Sketch:
    """A base's rows times random signs, taken while they are merged, so that they are read once."""

    def __init__(self, output: MergedTensor) -> None:
        random = np.random.default_rng(seed_of(output.name))
        work = F64 if ARRAY_TYPES[output.dtype] == F32 else F32
        self.signs = random.integers(0, 2, (_VECTORS, output.columns)).astype(work) * 2 - 1
        """(vectors, columns), of a wider type than the result's."""
        self.products = np.full((output.rows, _VECTORS), np.nan)
        """(rows, vectors); NaN for rows that were never added: the proof recomputes these."""
        self.moved = output.kind == "replaced"
        """Whether any row of the result differs from the base's bits."""

    def add(self, first: int, base: np.ndarray, made: np.ndarray) -> None:
        """Take rows of the base from `first` on, and what was made of them."""
        self.moved = self.moved or differ(base, made)
        self.products[first : first + len(base)] = project(base, self.signs)[1]


def project(rows: np.ndarray, signs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return each row's sum of squares, (rows,), and its products with signs, (rows, vectors)."""
    if (made := native.project_rows(rows, signs)) is not None:
        return made
    wide = rows.astype(signs.dtype)
    # One vector at a time: products with narrow matrices are slow.
    return np.vecdot(wide, wide), np.stack([wide @ some for some in signs], 1)


def differ(base: np.ndarray, found: np.ndarray) -> bool:
    """Return whether a result differs from the base rounded to the result's dtype."""
    if base.dtype != found.dtype:
        base = round_once(base.astype(F64), found.dtype)
    return not np.array_equal(base.view(bits_of(base)), found.view(bits_of(found)))


def bits_of(array: np.ndarray) -> np.dtype:
    """Return the unsigned integers of an array's size, to compare bits."""
    return np.dtype(f"u{array.dtype.itemsize}")


def seed_of(name: str) -> int:
    """Return a seed from the tensor's name, so that a failure is reproducible."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little")
