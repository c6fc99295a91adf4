"""Rounding once: to nearest, ties to even, from float64 or from an exact dyadic number."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from weightsmith.core.small_floats import BFLOAT16, as_float, small_float, to_bfloat16

BF16: np.dtype = small_float(BFLOAT16)
F16, F32, F64 = (np.dtype(kind) for kind in (np.float16, np.float32, np.float64))


@dataclass(frozen=True, slots=True, kw_only=True)
class Binary:
    """An IEEE-like binary format."""

    dtype: np.dtype
    bits: np.dtype
    """The unsigned integer of the same width."""
    width: int
    precision: int
    """Significand bits, including the implicit one."""
    least: int
    """Exponent of the smallest normal number."""

    @property
    def largest(self) -> float:
        """The largest finite value."""
        return (2 - 2.0 ** (1 - self.precision)) * 2.0 ** (1 - self.least)


def _binary(dtype: np.dtype, precision: int, least: int) -> Binary:
    bits = np.dtype(f"u{dtype.itemsize}")
    return Binary(
        dtype=dtype, bits=bits, width=8 * dtype.itemsize, precision=precision, least=least
    )


FORMATS = {BF16: _binary(BF16, 8, -126), F16: _binary(F16, 11, -14), F32: _binary(F32, 24, -126)}


def round_once(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return float64 or float32 values rounded once to bfloat16, float16 or float32.

    numpy casts float64 to bfloat16 via float32 and so rounds twice. Here the float32 step rounds to
    odd, which keeps the second rounding correct because float32 has more than two extra bits
    (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", 2008).
    """
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        if values.dtype == dtype:
            return values.copy()
        if values.dtype != F64 or dtype == F32:
            return _cast(as_float(values, F64 if values.dtype == F64 else F32), dtype)
        single = values.astype(F32)
        back = single.astype(F64)
        inexact = (back != values) & ~np.isnan(values)
        bits = single.view(np.uint32) - (np.abs(back) > np.abs(values))
        bits |= inexact
        return _cast(bits.view(F32), dtype)


def _cast(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    return to_bfloat16(values) if dtype == BF16 else values.astype(dtype)


def round_dyadic(numerator: int, exponent: int, form: Binary) -> int:
    """Return the bits of numerator · 2**exponent (not 0) rounded once; overflow gives infinity."""
    sign, magnitude = int(numerator < 0), abs(numerator)
    # Exponent of one unit in the last place, at least the subnormals'.
    unit = max(magnitude.bit_length() + exponent, form.least + 1) - form.precision
    shift = unit - exponent
    if shift <= 0:
        steps = magnitude << -shift
    else:
        steps, rest = magnitude >> shift, magnitude & ((1 << shift) - 1)
        half = 1 << (shift - 1)
        steps += rest > half or (rest == half and steps & 1)
    # Subnormals have exponent field 0; a carry into the next binade carries into the field too.
    field = unit + form.precision - 1 - form.least
    bits = (field << (form.precision - 1)) + steps
    infinity = ((1 << (form.width - form.precision)) - 1) << (form.precision - 1)
    return (sign << (form.width - 1)) | min(bits, infinity)
