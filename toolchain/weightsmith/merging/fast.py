"""`fast`: W + (B·A)·s in float32, rounded once; with numpy if its products equal torch's.

PEFT merges with torch, whose float32 matrix products are chains of fused multiply-adds in the order
of k on the tested CPUs. OpenBLAS does the same on CPUs with AVX-512. Then numpy gives the same
bits, and torch, whose import takes as long as merging a gigabyte, is not needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache

import numpy as np

from weightsmith.merging.kernel import Addition, Space, check_finite, is_below
from weightsmith.merging.outputs import Output
from weightsmith.merging.rounding import F32, F64, FORMATS

MIN_SIZE = 16
"""Below this number of rows or columns a library may sum in another order."""
_RANKS = range(2, 129)
"""Rank 1 may give -0, which a sum never is; with higher ranks a library sums in parts."""


def needs_torch(outputs: Iterable[Output]) -> bool:
    """Return whether numpy's products may differ from torch's for any output."""
    terms = [term for output in outputs for term in output.terms]
    usual = all(min(term.shape) >= MIN_SIZE and term.rank in _RANKS for term in terms)
    return bool(terms) and not (usual and products_are_fused())


@cache
def products_are_fused() -> bool:
    """Return whether numpy sums products as one chain of fused multiply-adds on this machine."""
    random = np.random.default_rng(1)
    for rows, depth, columns in ((MIN_SIZE, 64, 80), (48, _RANKS[-1], MIN_SIZE), (64, 9, 200)):
        left = random.standard_normal((rows, depth), np.float32)
        right = random.standard_normal((depth, columns), np.float32)
        total = np.zeros((rows, columns), np.float32)
        for k in range(depth):
            # A product of two float32 is exact in float64.
            term = left[:, k : k + 1].astype(F64) * right[k].astype(F64)
            total = (total + term).astype(np.float32)
        if not np.array_equal(left @ right, total):
            return False
    return True


def merge_rows_fast(
    addition: Addition, weight: np.ndarray, first: int, space: Space, out: np.ndarray
) -> None:
    """Fill `out` with the rows from `first` on; shapes and errors as `kernel.merge_rows`.

    `space` has dtype float32.
    """
    safe, limit = True, FORMATS[addition.dtype].largest * 0.99
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        for part in space.pieces(weight):
            sums = _sums(addition, first + part.start, first + part.stop, space)
            wide = space.signed[: sums.size].reshape(sums.shape)
            np.copyto(wide, weight[part])
            sums += wide
            safe = safe and is_below(sums, limit)
            np.copyto(out[part], sums, casting="unsafe")
    if not safe:
        check_finite(addition, weight, out)


def _sums(addition: Addition, first: int, end: int, space: Space) -> np.ndarray:
    """Compute (B·A)·s for some rows, one adapter after the other, in torch's order."""
    factors = addition.factors
    # A product of few rows is summed in another order, so include rows before them.
    start = max(0, min(first, end - MIN_SIZE))
    columns = factors.right.shape[1]
    size = (end - first) * columns
    total = space.sums[:size].reshape(-1, columns)
    for number, (gain, k, upto) in enumerate(groups(factors.gains)):
        rows, right = factors.left[start:end, k:upto], factors.right[k:upto]
        if start < first:
            product = (rows @ right)[first - start :]
        else:
            product = np.matmul(rows, right, out=space.spare[:size].reshape(-1, columns))
        scaled = total if number == 0 else product
        np.multiply(product, F32.type(gain), out=scaled)
        if number:
            total += scaled
    return total


def groups(gains: np.ndarray) -> Iterator[tuple[float, int, int]]:
    """Yield each run of equal gains with its start and end."""
    start = 0
    for end in [*(np.flatnonzero(np.diff(gains)) + 1).tolist(), len(gains)]:
        yield float(gains[start]), start, end
        start = end
