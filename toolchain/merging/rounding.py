"""Rounding once: to nearest, ties to even, from float64 or from an exact dyadic number."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Binary:
    """An IEEE-like binary format."""

    dtype: torch.dtype
    bits: torch.dtype
    """The integer type of the same width."""
    width: int
    precision: int
    """Bits of the significand, the implicit one included."""
    least: int
    """Exponent of the smallest normal number."""

    @property
    def largest(self) -> float:
        """The largest finite value."""
        return float(torch.finfo(self.dtype).max)


FORMATS = {
    torch.bfloat16: Binary(
        dtype=torch.bfloat16, bits=torch.int16, width=16, precision=8, least=-126
    ),
    torch.float16: Binary(dtype=torch.float16, bits=torch.int16, width=16, precision=11, least=-14),
    torch.float32: Binary(
        dtype=torch.float32, bits=torch.int32, width=32, precision=24, least=-126
    ),
}


def round_once(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return float64 or float32 values rounded once to bfloat16, float16 or float32.

    torch goes from float64 to bfloat16 through float32 and so rounds twice. Here the float32 step
    rounds to odd, which keeps the second rounding right because float32 has more than two bits to
    spare (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", 2008).
    """
    if values.dtype != torch.float64 or dtype == torch.float32:
        return values.to(dtype)
    single = values.to(torch.float32)
    back = single.to(torch.float64)
    inexact = (back != values) & ~torch.isnan(values)
    bits = single.view(torch.int32) - (back.abs() > values.abs()).to(torch.int32)
    return torch.where(inexact, bits | 1, bits).view(torch.float32).to(dtype)


def round_dyadic(numerator: int, exponent: int, form: Binary) -> int:
    """Return the bits of numerator · 2**exponent (not 0) rounded once; overflow gives infinity."""
    sign, magnitude = int(numerator < 0), abs(numerator)
    # Exponent of one unit in the last place, never below the subnormals'.
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
