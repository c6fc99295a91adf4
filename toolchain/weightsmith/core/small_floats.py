"""Floats that numpy lacks: ml_dtypes' types, or by their bits alone where it is not installed.

A server's image has numpy, and what else it has is its own: so a merge where a server starts runs
without ml_dtypes. Such a type then only names the bits, and what computes with them goes through
`as_float` and `is_finite`, which give the same numbers either way.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

BFLOAT16 = "bfloat16"
_BITS = {BFLOAT16: "<u2", "float8_e4m3fn": "u1", "float8_e5m2": "u1"}


@cache
def small_float(name: str) -> np.dtype[np.generic]:
    """Return the type of a name of ml_dtypes, or one of as many bits that has this name."""
    import numpy as np

    try:
        import ml_dtypes
    except ImportError:
        return np.dtype([(name, _BITS[name])])
    found: np.dtype[np.generic] = np.dtype(getattr(ml_dtypes, name))
    return found


def name_of(dtype: np.dtype[np.generic]) -> str:
    """Return a type's name, also of one that is known by its bits alone."""
    return dtype.names[0] if dtype.names else dtype.name


def as_float(
    values: npt.NDArray[np.generic], dtype: npt.DTypeLike = "f4"
) -> npt.NDArray[np.floating]:
    """Return floats as float32, or as another type of numpy's; bfloat16 is widened by its bits."""
    import numpy as np

    if name_of(values.dtype) == BFLOAT16:
        bits = np.asarray(values.view("<u2").astype(np.uint32))
        values = np.left_shift(bits, 16, out=bits).view(np.float32)
    return np.asarray(values.astype(dtype, copy=False))


def is_finite(values: npt.NDArray[np.generic]) -> npt.NDArray[np.bool_]:
    """Return which floats are neither infinite nor NaN."""
    import numpy as np

    if values.dtype.names:
        return np.asarray((values.view("<u2") & 0x7F80) != 0x7F80)
    return np.asarray(np.isfinite(values))


def to_bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.generic]:
    """Return float32 rounded to bfloat16: to nearest, ties to even; NaN stays NaN."""
    import numpy as np

    dtype = small_float(BFLOAT16)
    if not dtype.names:
        with np.errstate(over="ignore", invalid="ignore", under="ignore"):
            return np.asarray(values.astype(dtype))
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
    rounded = np.where(np.isnan(values), bits | np.uint32(1 << 22), rounded)
    return np.asarray((rounded >> np.uint32(16)).astype("<u2").view(dtype))
