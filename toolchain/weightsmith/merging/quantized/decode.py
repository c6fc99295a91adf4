"""Dequantize weights from codes and scales, one tensor at a time, in float32, rounded once.

4-bit NormalFloat is also encoded, for QLoRA's round trip. It is defined in Dettmers et al., "QLoRA"
(2023), appendix E; arithmetic and layout are bit for bit those of bitsandbytes
(`functional.quantize_4bit`, `backends/default/ops.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from weightsmith.core.errors import InputRefused
from weightsmith.merging.quantized.layout import MX_GROUP, Packed
from weightsmith.merging.rounding import F32, round_once
from weightsmith.merging.stream import ARRAY_TYPES

Parts = Mapping[str, np.ndarray]
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Column of nibble i of a word; AutoAWQ's `order_map`."""
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes of E2M1; the code's high bit is the sign (OCP Microscaling Formats, section 5.3.3)."""
_NVFP4_GROUP = 16
_NAN = 255
"""In E8M0, the type of MX scales."""
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


def decode(weight: Packed, parts: Parts) -> np.ndarray:
    """Return the dequantized weight in its plain dtype and shape.

    `parts` maps part names to stored tensors in their own dtype and shape. Peak memory is a few
    times the dequantized tensor in float32. Raises InputRefused if the parts' shapes do not fit.
    """
    try:
        values = DECODERS[weight.scheme](weight, parts)
        return round_once(values.reshape(weight.shape), ARRAY_TYPES[weight.dtype])
    except (IndexError, ValueError) as error:
        shapes = ", ".join(f"{part} {list(array.shape)}" for part, array in sorted(parts.items()))
        raise InputRefused(
            f"{weight.name} cannot be dequantized as {weight.scheme}: shapes {shapes} do not match",
            hint="the checkpoint is damaged or of an unknown variant: merge onto the original "
            "16-bit checkpoint instead",
        ) from error


def _unpack_words(words: np.ndarray, bits: int) -> np.ndarray:
    """Return the unsigned codes of (…, words) int32, as (…, words · 32 // bits) int32.

    Codes are a little-endian bit stream along the last dimension; they may straddle words, as in
    AutoGPTQ's 3-bit layout.
    """
    unsigned = np.ascontiguousarray(words).view(np.uint32)
    starts = np.arange(words.shape[-1] * 32 // bits) * bits
    place, shift = starts // 32, (starts % 32).astype(np.uint32)
    codes = unsigned[..., place] >> shift
    across = shift + bits > 32
    if across.any():
        codes[..., across] |= unsigned[..., place[across] + 1] << (32 - shift[across])
    return (codes & np.uint32((1 << bits) - 1)).astype(np.int32)


def _bnb_4bit(weight: Packed, parts: Parts) -> np.ndarray:
    options, absmax = weight.options, parts["absmax"].reshape(-1)
    if "nested_absmax" in parts:
        scales = parts["nested_absmax"].reshape(-1).repeat(options["nested_blocksize"])
        absmax = parts["nested_code"][absmax] * scales[: absmax.size]
        absmax += F32.type(options["nested_offset"])
    codes = parts["weight"].reshape(-1).view(np.uint8)
    block = options["blocksize"]
    return _decode_blocks(codes, parts["code"], absmax.astype(F32), block, weight.shape)


def _bnb_int8(_weight: Packed, parts: Parts) -> np.ndarray:
    # The constant (1/127) and order of bitsandbytes' int8_vectorwise_dequant.
    rows = parts["weight"].astype(F32)
    rows *= parts["scale"].astype(F32).reshape(-1, 1)
    rows *= F32.type(7.874015718698502e-3)
    return rows


def _gptq(weight: Packed, parts: Parts) -> np.ndarray:
    bits, columns = weight.options["bits"], weight.shape[1]
    codes = _unpack_words(parts["weight"].T, bits)  # (out, in)
    zeros = _unpack_words(parts["zeros"], bits)  # (groups, out)
    zeros = (zeros + weight.options["zero_offset"]) & ((1 << bits) - 1)
    place = parts.get("groups")
    if place is None:
        size = weight.options["group_size"]
        place = np.arange(columns) // (columns if size < 1 else size)
    scaled: np.ndarray = (codes - zeros.T[:, place]).astype(F32)
    scaled *= parts["scale"].astype(F32).T[:, place]
    return scaled


def _awq(weight: Packed, parts: Parts) -> np.ndarray:
    order = np.argsort(_AWQ_ORDER)

    def columns(words: np.ndarray) -> np.ndarray:
        nibbles = _unpack_words(words, 4).reshape(len(words), -1, 8)
        return nibbles[:, :, order].reshape(len(words), -1)

    codes, zeros = columns(parts["weight"]), columns(parts["zeros"])  # (in, out), (groups, out)
    place = np.arange(len(codes)) // (weight.shape[1] // len(zeros))
    scaled: np.ndarray = (codes - zeros[place]).astype(F32) * parts["scale"].astype(F32)[place]
    return scaled.T


def _awq_gemv(weight: Packed, parts: Parts) -> np.ndarray:
    """Dequantize AutoAWQ's `WQLinear_GEMV`: codes in input order, groups padded."""
    size = weight.options["group_size"]
    groups = weight.shape[1] // size
    codes = _unpack_words(parts["weight"], 4)
    zeros = _unpack_words(parts["zeros"], 4)[:, :groups].repeat(size, 1)
    scaled: np.ndarray = (codes - zeros).astype(F32)
    scaled *= parts["scale"].astype(F32)[:, :groups].repeat(size, 1)
    return scaled


def _ct_packed(weight: Packed, parts: Parts) -> np.ndarray:
    """Dequantize signed codes stored with an offset of half their range."""
    bits = weight.options["bits"]
    *lead, columns = weight.shape
    half = 1 << (bits - 1)
    codes = _unpack_words(parts["weight"], bits)[..., :columns] - half
    zeros = parts.get("zeros")
    if zeros is not None and zeros.dtype == np.int32:
        # Packed along the rows.
        zeros = _unpack_words(zeros.swapaxes(-1, -2), bits)[..., : lead[-1]].swapaxes(-1, -2) - half
    return _apply(codes.astype(F32), parts["scale"], zeros, parts.get("groups"))


def _scaled(weight: Packed, parts: Parts) -> np.ndarray:
    values, block, scale = parts["weight"].astype(F32), weight.options.get("block"), parts["scale"]
    if scale.dtype == np.uint8:  # as in MXFP8
        scale = np.ldexp(F32.type(1), _exponents(weight, scale))
    return _apply(values, scale, parts.get("zeros"), parts.get("groups"), block)


def _apply(
    values: np.ndarray,
    scale: np.ndarray,
    zeros: np.ndarray | None,
    groups: np.ndarray | None,
    block: list[int] | None = None,
) -> np.ndarray:
    """Return (values - zeros) · scale, both per tensor, row, group or block."""
    place = None if groups is None or (groups < 0).any() else groups
    if zeros is not None:
        values = values - _spread(zeros.astype(F32), values.shape, place, block)
    product: np.ndarray = values * _spread(scale.astype(F32), values.shape, place, block)
    return product


def _spread(
    scale: np.ndarray,
    shape: tuple[int, ...],
    place: np.ndarray | None,
    block: list[int] | None,
) -> np.ndarray:
    if scale.size == 1:
        return scale.reshape([1] * len(shape))
    if scale.ndim == 1:
        scale = scale[:, None]
    if place is not None:
        return scale[..., place]
    for axis, count in enumerate(scale.shape):
        if count not in (1, shape[axis]):
            size = block[axis - len(shape)] if block else shape[axis] // count
            if not size or -(-shape[axis] // size) != count:
                raise ValueError(f"{count} blocks of {size} do not cover {shape[axis]}")
            scale = scale.repeat(size, axis).take(range(shape[axis]), axis)
    return scale


def _e2m1(codes: np.ndarray) -> np.ndarray:
    """Return 4-bit floats from bytes, low nibble first, along the last dimension."""
    table = np.array([*_FP4, *(-value for value in _FP4)], F32)
    pairs = np.stack((codes & 15, codes >> 4), -1)
    return table[pairs.reshape(*codes.shape[:-1], -1)]


def _nvfp4(weight: Packed, parts: Parts) -> np.ndarray:
    return _in_groups(weight, parts, parts["scale"].astype(F32) / parts["global_scale"].astype(F32))


def _modelopt_nvfp4(weight: Packed, parts: Parts) -> np.ndarray:
    """Dequantize as ModelOpt's NVFP4QTensor.dequantize, which multiplies by the second scale."""
    return _in_groups(weight, parts, parts["scale"].astype(F32) * parts["scale_2"].astype(F32))


def _in_groups(weight: Packed, parts: Parts, scale: np.ndarray) -> np.ndarray:
    if scale.shape[-1] * _NVFP4_GROUP != weight.shape[-1]:
        raise ValueError("expected one scale per 16 columns")
    values = _e2m1(parts["weight"])
    values *= scale.repeat(_NVFP4_GROUP, -1)
    return values


def _exponents(weight: Packed, stored: np.ndarray) -> np.ndarray:
    """Return the exponents of 2 of scales in E8M0: OCP Microscaling Formats, section 5.4.1.

    Raises InputRefused for one that stands for NaN.
    """
    if (stored == _NAN).any():
        raise InputRefused(
            f"{weight.name} has a scale of 255, which stands for NaN",
            hint="the checkpoint is damaged: fetch or quantize it again, or merge onto the original"
            " 16-bit checkpoint",
        )
    return stored.astype(np.int32) - 127


def _ct_mxfp4(weight: Packed, parts: Parts) -> np.ndarray:
    """Dequantize compressed-tensors' MXFP4: rows of bytes, and an exponent per 32 columns."""
    if parts["scale"].shape[-1] * MX_GROUP != weight.shape[-1]:
        raise ValueError("expected one scale per 32 columns")
    exponents = _exponents(weight, parts["scale"]).repeat(MX_GROUP, -1)
    scaled: np.ndarray = np.ldexp(_e2m1(parts["weight"]), exponents)
    return scaled


def _mxfp4(weight: Packed, parts: Parts) -> np.ndarray:
    values = _e2m1(parts["weight"])
    exponents = _exponents(weight, parts["scale"])[..., None]
    scaled: np.ndarray = np.ldexp(values, exponents)  # (experts, out, groups, 32)
    return scaled.reshape(*scaled.shape[:2], -1).swapaxes(-1, -2)


DECODERS: dict[str, Callable[[Packed, Parts], np.ndarray]] = {
    "bnb-4bit": _bnb_4bit,
    "bnb-int8": _bnb_int8,
    "gptq": _gptq,
    "awq-gemm": _awq,
    "awq-gemv": _awq_gemv,
    "ct-packed": _ct_packed,
    "scaled": _scaled,
    "nvfp4": _nvfp4,
    "modelopt-nvfp4": _modelopt_nvfp4,
    "ct-mxfp4": _ct_mxfp4,
    "mxfp4": _mxfp4,
}


def _decode_blocks(
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
