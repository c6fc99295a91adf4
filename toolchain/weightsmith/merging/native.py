"""The merge's inner loops in C, where their library is there: one pass over a block, not a dozen.

`kernel.py`, `repair.py` and `proof.py` do the same with numpy. An exact merge has the
same bits either way, so nobody needs to know which one it was.

The library reads arrays in C order. Transposed factors and some decoded weights have another
order, so each function copies what is not C-contiguous.
"""

from __future__ import annotations

import ctypes

import numpy as np

from weightsmith.core.kernels import library
from weightsmith.merging.rounding import BF16, F16, F32, F64, FORMATS

PANEL = 32
"""Columns of a panel of packed factors, as in sums.h."""
_TYPES = {BF16: 0, F16: 1, F32: 2}


def rounds(base: np.dtype, result: np.dtype) -> bool:
    """Return whether the library is there and rounds sums of these types."""
    return base in _TYPES and result in (BF16, F16) and library.found() is not None


def panels(right: np.ndarray) -> np.ndarray:
    """Return a factor (K, columns) in panels: (panels, K, PANEL), filled up with zeros."""
    depth, columns = right.shape
    full, rest = divmod(columns, PANEL)
    out = np.zeros((full + (rest > 0), depth, PANEL), F32)
    out[:full] = right[:, : full * PANEL].reshape(depth, full, PANEL).transpose(1, 0, 2)
    if rest:
        out[full, :, :rest] = right[:, full * PANEL :]
    return out


def round_sums(
    left: np.ndarray, packed: np.ndarray, bound: np.ndarray, weight: np.ndarray, out: np.ndarray
) -> tuple[np.ndarray, bool]:
    """Round `weight` + left · right into `out` where the rows' bounds allow only one result.

    `left` is float32 (rows, K), `packed` the right factor in panels, `bound` float32 (rows, 1),
    `out` C-contiguous. Returns the flat indices of undecided elements, and whether no sum is near
    overflow.
    """
    (rows, columns), depth = weight.shape, left.shape[1]
    undecided, above = np.empty(weight.size, np.int64), ctypes.c_int()
    left, packed, bound, weight = map(np.ascontiguousarray, (left, packed, bound, weight))
    count = library.kernels().weightsmith_round_sums(
        *(left.ctypes.data, packed.ctypes.data, depth),
        *(weight.ctypes.data, _TYPES[weight.dtype], bound.ctypes.data),
        *(out.ctypes.data, _TYPES[out.dtype], rows, columns),
        *(FORMATS[out.dtype].largest * 0.99, undecided.ctypes.data, ctypes.byref(above)),
    )
    return undecided[:count].copy(), not above.value


def dot_products(
    left: np.ndarray, right: np.ndarray, gains: np.ndarray, rows: np.ndarray, columns: np.ndarray
) -> np.ndarray | None:
    """Return Σₖ left[row, k] · gains[k] · right[column, k] in float64; None without the library.

    `left` and `right` are float32, `gains` is float64, `rows` and `columns` are pairs.
    """
    if library.found() is None:
        return None
    left, right, gains = map(np.ascontiguousarray, (left, right, gains))
    rows, columns = (np.ascontiguousarray(array, np.int64) for array in (rows, columns))
    out = np.empty(len(rows), F64)
    library.kernels().weightsmith_dot_products(
        *(left.ctypes.data, right.ctypes.data, gains.ctypes.data, left.shape[1]),
        *(rows.ctypes.data, columns.ctypes.data, len(rows), out.ctypes.data),
    )
    return out


def project_rows(weights: np.ndarray, signs: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Return each row's sum of squares, (rows,), and products with two vectors, (rows, 2).

    `signs` are float32 (2, columns). None without the library or for other types.
    """
    if weights.dtype not in _TYPES or signs.dtype != F32 or library.found() is None:
        return None
    weights, signs = map(np.ascontiguousarray, (weights, signs))
    rows, columns = weights.shape
    squares, products = np.empty(rows, F32), np.empty((rows, 2), F32)
    library.kernels().weightsmith_project_rows(
        *(weights.ctypes.data, _TYPES[weights.dtype], rows, columns),
        *(signs.ctypes.data, squares.ctypes.data, products.ctypes.data),
    )
    return squares, products


def sum_words(words: np.ndarray, factors: np.ndarray) -> int:
    """Return Σ words · factors modulo 2**64 of two contiguous uint64 arrays."""
    if library.found() is None:
        return int(np.dot(words, factors))
    found: int = library.kernels().weightsmith_sum_words(
        words.ctypes.data, factors.ctypes.data, len(words)
    )
    return found
