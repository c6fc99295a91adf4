"""4-bit NormalFloat as in bitsandbytes: encode, decode, and QLoRA's round trip.

NF4 is defined in Dettmers et al., "QLoRA" (2023), appendix E; arithmetic and layout are bit for
bit those of bitsandbytes (`functional.quantize_4bit`, `backends/default/ops.py`).
"""

from __future__ import annotations

import math

import numpy as np

from weightsmith.merging.rounding import F32, round_once

NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
_CODE = np.array(NF4, F32)
_EDGES = (_CODE[:-1] + _CODE[1:]) / F32.type(2)
BLOCK = 64
_NESTED_BLOCK = 256
_CHUNK = 1 << 20
"""Elements processed at once; a multiple of every block size."""


def decode_blocks(
    packed: np.ndarray, code: np.ndarray, absmax: np.ndarray, block: int, shape: tuple[int, ...]
) -> np.ndarray:
    """Return code[nibble] · absmax[block] in float32; the high nibble comes first.

    `packed` (⌈n/2⌉,) uint8, `code` (16,) and `absmax` (⌈n/block⌉,) float32.
    """
    count = math.prod(shape)
    nibbles = np.stack((packed >> 4, packed & 15), -1).reshape(-1)[:count]
    values = code.astype(F32)[nibbles]
    whole = count // block * block
    values[:whole].reshape(-1, block)[:] *= absmax[: whole // block, None]
    values[whole:] *= absmax[whole // block :]
    return values.reshape(shape)


def round_trip(weight: np.ndarray, *, double: bool = False) -> np.ndarray:
    """Return the weight after rounding to NF4, in its own dtype and shape.

    These are the weights that QLoRA training with a 4-bit base used. `double` also quantizes the
    block scales. A block's scale is its largest magnitude; blocks are in row order.
    """
    flat, out = weight.reshape(-1), np.empty_like(weight).reshape(-1)
    starts = range(0, len(flat), _CHUNK)
    scales = np.concatenate([_scales(flat[start : start + _CHUNK], BLOCK) for start in starts])
    kept = _round_scales(scales) if double else scales
    for start in starts:
        part = flat[start : start + _CHUNK].astype(F32)
        first = start // BLOCK
        of_part = slice(first, first - (-len(part) // BLOCK))
        whole = len(part) // BLOCK * BLOCK
        safe = np.maximum(scales[of_part], F32.type(1e-38))
        scaled = np.empty_like(part)
        # bitsandbytes multiplies whole blocks by the reciprocal, and divides the rest.
        reciprocal = F32.type(1) / safe[: whole // BLOCK, None]
        np.multiply(part[:whole].reshape(-1, BLOCK), reciprocal, scaled[:whole].reshape(-1, BLOCK))
        np.divide(part[whole:], safe[whole // BLOCK :], scaled[whole:])
        # The nearest codes; a tie goes to the lower one.
        values = _CODE[np.searchsorted(_EDGES, np.clip(scaled, -1, 1))]
        values *= kept[of_part].repeat(BLOCK)[: len(values)]
        out[start : start + _CHUNK] = round_once(values, weight.dtype)
    return out.reshape(weight.shape)


def _scales(flat: np.ndarray, block: int) -> np.ndarray:
    padded = np.pad(np.abs(flat.astype(F32)), (0, -len(flat) % block))
    scales: np.ndarray = padded.reshape(-1, block).max(1)
    return scales


def _round_scales(scales: np.ndarray) -> np.ndarray:
    """Return scales after bitsandbytes' double quantization: the mean plus 8-bit differences."""
    offset = F32.type(scales.astype(np.float64).mean())
    rest, code = scales - offset, dynamic_code()
    spread = _scales(rest, _NESTED_BLOCK).repeat(_NESTED_BLOCK)[: len(rest)]
    scaled = np.clip(rest * (F32.type(1) / np.maximum(spread, F32.type(1e-38))), -1, 1)
    nearest = np.searchsorted((code[:-1] + code[1:]) / F32.type(2), scaled)
    kept: np.ndarray = code[nearest] * spread + offset
    return kept


def dynamic_code() -> np.ndarray:
    """Return the 256 values of 8-bit dynamic quantization, ascending, in float32.

    Sign, a run of zero bits that counts decimal places, then a linear fraction in the remaining
    bits (Dettmers, "8-Bit Approximations for Parallelism in Deep Learning", 2015);
    `functional.create_dynamic_map`.
    """
    values = [0.0, 1.0]
    for places in range(7):
        edges = _linspace(2**places + 1)
        means = (edges[:-1] + edges[1:]) / F32.type(2) * F32.type(10.0 ** (places - 6))
        values += [*means.tolist(), *(-means).tolist()]
    return np.array(sorted(values), F32)


def _linspace(count: int) -> np.ndarray:
    """Return `torch.linspace(0.1, 1, count)`, computed from both ends with fused products."""
    first, last = F32.type(0.1), F32.type(1)
    step = np.float64((last - first) / F32.type(count - 1))
    places = np.arange(count)
    low, high = np.float64(first) + step * places, np.float64(last) - step * places[::-1]
    edges: np.ndarray = np.where(places < count // 2, low, high).astype(F32)
    return edges
