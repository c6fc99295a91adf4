"""Rounding with a scale per tile, and reading such codes back, in C where it is compiled."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weightsmith.core.kernels import library
from weightsmith.core.small_floats import name_of

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_TYPES = {"bfloat16": 0, "float16": 1, "float32": 2}
"""As in types.h."""
_CODES = {"F8_E4M3": 0, "I8": 1, "U8": 2}
_SCALES = {"F32": 0, "F8_E4M3": 1, "U8": 2}
"""By safetensors dtype, as in rounding.h."""
_LANES = 16
"""Of the widest vectors."""


def reads(dtype: np.dtype[np.generic]) -> bool:
    """Return whether the library is there and reads weights of this type."""
    return name_of(dtype) in _TYPES and library.found() is not None


def round_tiles(
    rows: npt.NDArray[np.generic],
    tile: tuple[int, int],
    shared: float,
    codes: tuple[str, npt.NDArray[np.generic]],
    scales: tuple[str, npt.NDArray[np.generic]],
) -> bool:
    """Fill `codes` and `scales`, each with its safetensors dtype; return False for NaN or infinity.

    `rows` is [n, columns], of a type that `reads` names; `rounding.h` says what else holds. Other
    threads run meanwhile.
    """
    import numpy as np

    (count, columns), (high, wide) = rows.shape, tile
    rows = np.ascontiguousarray(rows)
    room = np.empty(-(-columns // wide) + _LANES, np.float32)
    wrong = library.kernels().weightsmith_round_tiles(
        *(rows.ctypes.data, _TYPES[name_of(rows.dtype)], count, columns, high, wide),
        *(_CODES[codes[0]], _SCALES[scales[0]], shared),
        *(codes[1].ctypes.data, scales[1].ctypes.data, room.ctypes.data),
    )
    return not wrong


def compare_tiles(
    codes: npt.NDArray[np.uint8],
    values: npt.NDArray[np.float32],
    scales: npt.NDArray[np.float32],
    tile: tuple[int, int],
    weights: npt.NDArray[np.generic],
) -> tuple[float, float] | None:
    """Return the sums of squares of what codes stand for minus `weights`, and of `weights`.

    `codes` is [n, bytes], `values` [256, weights per byte], `scales` [tiles of rows, of columns],
    `weights` [n, columns], of a type that `reads` names. Returns None if a code stands for NaN or
    infinity. Other threads run meanwhile.
    """
    import numpy as np

    (count, columns), (high, wide) = weights.shape, tile
    if scales.shape != (-(-count // high), -(-columns // wide)) or len(values) != 256:
        raise ValueError(f"scales of shape {scales.shape} for weights of {weights.shape}")
    codes, values, scales, weights = map(np.ascontiguousarray, (codes, values, scales, weights))
    sums = np.empty(2, np.float64)
    wrong = library.kernels().weightsmith_compare_tiles(
        *(codes.ctypes.data, values.ctypes.data, values.shape[1]),
        *(scales.ctypes.data, high, wide),
        *(weights.ctypes.data, _TYPES[name_of(weights.dtype)], count, columns, sums.ctypes.data),
    )
    return None if wrong else (float(sums[0]), float(sums[1]))
