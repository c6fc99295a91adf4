"""Round rows of a matrix to a scheme's codes and scales: in C where it is compiled, else in numpy.

Both give the same bytes. The numbers are those of compressed-tensors' own quantization in float32
(quantization/utils/helpers.py: calculate_qparams and generate_gparam;
quantization/lifecycle/forward.py).
"""

from __future__ import annotations

import math
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from weightsmith.core.kernels import tiles
from weightsmith.models.tensors import array_type, widened
from weightsmith.quantizers.schemes import Scheme

Floats: TypeAlias = npt.NDArray[np.float32]

_LARGEST_SCALE = 448.0
"""Of float8_e4m3fn (arXiv 2209.05433)."""
_LEAST_SCALE = 0.125
"""Stands for a scale of 0 in float8_e4m3fn, as in compressed-tensors."""
_BIAS = 127
_FLOAT4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
_LIMITS = (
    (0.25, False), (0.75, True), (1.25, False), (1.75, True), (2.5, False), (3.5, True),
    (5.0, False),
)  # fmt: skip
"""Where the next 4-bit code begins, and whether the limit itself belongs to it: ties to even."""


def fused_scale(most: float, scheme: Scheme) -> np.float32:
    """Return the scale that fused matrices have in common, from their largest magnitude.

    It maps the largest scale of a group to the largest value of the scales' type.
    """
    least = np.finfo(np.float32).tiny
    with np.errstate(over="ignore"):
        found = np.float32(_LARGEST_SCALE * scheme.largest) / np.maximum(np.float32(most), least)
    return np.float32(found) if np.isfinite(found) else np.float32(1)


def to_float8(rows: npt.NDArray[np.generic], scale: np.float32) -> npt.NDArray[np.generic]:
    """Return rows divided by a scale, rounded to float8_e4m3fn and cut off at its largest number.

    Raises ValueError for weights that are not finite.
    """
    values = widened(rows)
    if not np.isfinite(values).all():
        raise ValueError("weights that are not finite")
    scaled = np.divide(values, scale, dtype=np.float32)
    np.clip(scaled, -_LARGEST_SCALE, _LARGEST_SCALE, out=scaled)
    return _float8(scaled).view(array_type("F8_E4M3"))


def to_nvfp4(
    rows: npt.NDArray[np.generic], scale: np.float32
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.generic]]:
    """Return codes [n, inputs / 2] and scales [n, inputs / 16] of rows, by ModelOpt's arithmetic.

    `scale` is the matrix's: its largest magnitude divided by 6 * 448, by which scales are
    multiplied (NVFP4QTensor of ModelOpt 0.47). Raises ValueError for weights that are not finite.
    """
    values = widened(rows)
    if not np.isfinite(values).all():
        raise ValueError("weights that are not finite")
    most = np.abs(values).reshape(len(values), -1, 16).max(2)
    wide = most / (np.float32(6) * scale)
    wide = np.where(wide == 0, np.float32(1), wide)
    stored = _float8(np.clip(wide, np.float32(2**-9), np.float32(_LARGEST_SCALE)))
    scales = stored.view(array_type("F8_E4M3"))
    groups = values.reshape(len(values), -1, 16) / (scales.astype(np.float32) * scale)[:, :, None]
    return _float4(groups.reshape(values.shape)), scales


def round_rows(
    rows: npt.NDArray[np.generic], scheme: Scheme, shared: np.float32 | None = None
) -> tuple[npt.NDArray[np.generic], npt.NDArray[np.generic]]:
    """Return codes and scales of rows [n, inputs] of floats, in the scheme's types.

    `n` is a multiple of the tile's outputs unless the matrix ends there; for 4 bits, `inputs` is a
    multiple of the tile's. Without a fused scale, a tile of zeros has scale 1 in float32 and the
    least one as an exponent. `shared` is the fused scale of a scheme that has one. Raises
    ValueError for weights that are not finite.
    """
    if scheme.fused_scale and shared is None:
        raise ValueError(f"{scheme.format.name} needs the fused scale")
    if not scheme.in_c or not tiles.reads(rows.dtype):
        return _round_rows(widened(rows), scheme, shared)
    (count, inputs), (high, wide) = rows.shape, (scheme.tile[0], scheme.tile[1] or rows.shape[1])
    size = inputs // 2 if scheme.packed else inputs
    codes = np.empty((count, size), array_type(scheme.codes))
    scales = np.empty((-(-count // high), -(-inputs // wide)), array_type(scheme.scales))
    named = (scheme.codes, codes), (scheme.scales, scales)
    if not tiles.round_tiles(rows, (high, wide), float(shared or 0), *named):
        raise ValueError("weights that are not finite")
    return codes, scales


def _round_rows(
    rows: Floats, scheme: Scheme, shared: np.float32 | None
) -> tuple[npt.NDArray[np.generic], npt.NDArray[np.generic]]:
    count, inputs = rows.shape
    outputs, width = scheme.tile[0], scheme.tile[1] or inputs
    below, right = -count % outputs, -inputs % width
    if below or right:
        rows = np.pad(rows, ((0, below), (0, right)))
    # The largest magnitude of each tile: [tiles of outputs, tiles of inputs].
    most, left = np.abs(rows).reshape(-1, outputs, rows.shape[1]).max(1), width
    if width == rows.shape[1]:
        most, left = most.max(1, keepdims=True), 1
    while left % 2 == 0:  # three times as fast as a maximum over a short axis
        most, left = np.maximum(most[:, ::2], most[:, 1::2]), left // 2
    if not np.isfinite(most).all():
        raise ValueError("weights that are not finite")
    if scheme.tops:
        codes, stored = _with_least_error(rows, most, scheme, shared)
        return codes[:count, : inputs // 2], stored
    stored, scale = _scales(most, scheme, shared)
    wide = np.repeat(scale, width, 1) if scheme.tile[1] else scale
    scaled = (rows.reshape(-1, outputs, rows.shape[1]) / wide[:, None]).reshape(rows.shape)
    if scheme.packed:
        return _float4(scaled)[:count, : inputs // 2], stored
    np.clip(scaled, -scheme.largest, scheme.largest, out=scaled)
    is_float, dtype = scheme.codes == "F8_E4M3", array_type(scheme.codes)
    codes = _float8(scaled).view(dtype) if is_float else np.rint(scaled, out=scaled).astype(dtype)
    return codes[:count, :inputs], stored


def _with_least_error(
    rows: Floats, most: Floats, scheme: Scheme, shared: np.float32 | None
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.generic]]:
    """Return 4-bit codes and scales, each tile with the one of `tops` that loses least."""
    count, width = len(rows), scheme.tile[1]
    found: list[tuple[npt.NDArray[np.uint8], npt.NDArray[np.generic], Floats]] = []
    for top in scheme.tops:
        # Of huge weights, errors may be infinite: equal ones keep the first.
        with np.errstate(over="ignore", under="ignore"):
            stored, scale = _scales(most, scheme, shared, top)
            wide = np.repeat(scale, width, 1)
            codes = _float4(rows / wide)
            pairs = np.stack([codes & np.uint8(15), codes >> np.uint8(4)], -1)
            error = np.square(_FLOAT4[pairs.reshape(rows.shape)] * wide - rows)
            for _ in range(width.bit_length() - 1):  # in one order, on every CPU
                error = error[:, ::2] + error[:, 1::2]
        found.append((codes, stored, error))
    codes, stored, least = found[0]
    for other, scales, error in found[1:]:
        better = error < least
        least = np.where(better, error, least)
        raw = np.where(better, scales.view(np.uint8), stored.view(np.uint8))
        stored = raw.view(stored.dtype)
        bytes_ = np.repeat(better, width // 2, 1)
        codes = np.where(bytes_, other, codes).reshape(count, -1)
    return codes, stored


def _scales(
    most: Floats, scheme: Scheme, shared: np.float32 | None, top: float = 0
) -> tuple[npt.NDArray[np.generic], Floats]:
    """Return a tile's scales as they are stored, and what its weights are divided by.

    `top` is what its largest magnitude becomes; 0: the largest code.
    """
    if scheme.scales == "U8":
        # Exponents of 2 plus 127: scales of the OCP's MX formats. The largest magnitude is rounded
        # up to a power of 2 from 1.75 times the one below on. So it becomes at least 3.5 and less
        # than 7 in 4 bits, where above 6 it is cut off, and at least 224 and less than 448 in 8.
        exponents = ((most.view(np.int32) + (1 << 21)) >> 23) - int(math.log2(scheme.largest))
        stored = np.clip(exponents, 0, 254).astype(np.uint8)
        powers = np.ldexp(np.float32(1), stored.astype(np.int32) - _BIAS)
        return stored, powers.astype(np.float32)
    scale = most / np.float32(top or scheme.largest)
    if shared is None:
        scale = np.where(scale > 0, scale, np.float32(1)).astype(np.float32)
        return scale, scale
    small = _float8(np.minimum(scale * shared, np.float32(_LARGEST_SCALE)))
    exponent = (small >> np.uint8(3)).astype(np.int32)
    wide = np.ldexp((small & 7) + np.float32(8) * (exponent > 0), np.maximum(exponent, 1) - 10)
    wide = np.where(wide == 0, np.float32(_LEAST_SCALE), wide).astype(np.float32)
    return _float8(wide).view(array_type(scheme.scales)), np.asarray(wide / shared, np.float32)


def _float8(values: Floats) -> npt.NDArray[np.uint8]:
    """Return float8_e4m3fn of values from -448 to 448, four times as fast as ml_dtypes' cast."""
    bits = values.view(np.uint32)
    sign = (bits >> np.uint32(24)).astype(np.uint8) & np.uint8(0x80)
    size = np.abs(values)
    subnormal = np.rint(np.minimum(size * np.float32(512), np.float32(9))).astype(np.uint8)
    # Add half of the last kept bit, a bit less on a tie with an even code, and move the exponent's
    # bias from 127 to 7.
    bits = size.view(np.uint32)
    bits += (bits >> np.uint32(20)) & np.uint32(1)
    bits += np.uint32((0x7FFFF - (120 << 23)) % (1 << 32))
    bits >>= np.uint32(20)
    codes = bits.astype(np.uint8)
    np.copyto(codes, subnormal, where=subnormal <= 8)
    codes |= sign
    return codes


def _float4(values: Floats) -> npt.NDArray[np.uint8]:
    """Return two codes of float4_e2m1 per byte: 0, 0.5, 1, 1.5, 2, 3, 4, 6, and bit 3 the sign."""
    codes = (values < 0).view(np.uint8) << np.uint8(3)
    size = np.abs(values, out=values)
    for limit, included in _LIMITS:
        above = size >= np.float32(limit) if included else size > np.float32(limit)
        codes += above.view(np.uint8)
    return codes[:, ::2] | (codes[:, 1::2] << np.uint8(4))
