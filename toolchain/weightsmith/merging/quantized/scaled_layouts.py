"""Weights of compressed-tensors, and of 8-bit and 4-bit floats with scales.

Sources: compressed-tensors `compressors/`, transformers `integrations/finegrained_fp8.py`,
`fbgemm_fp8.py` and `mxfp4.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from weightsmith.merging.quantized.packed import (
    FLOAT8,
    Packed,
    ReadBytes,
    Tensors,
    modules,
    part,
    plain_dtype,
    some,
    undecodable,
)
from weightsmith.models.safetensors import TensorInfo


def compressed(
    config: Mapping[str, Any], settings: Mapping[str, Any], tensors: Tensors, read: ReadBytes
) -> Iterator[Packed]:
    """Yield the weights that compressed-tensors stores."""
    if (settings.get("sparsity_config") or {}).get("format", "dense") != "dense":
        raise undecodable("sparse weights are not supported")
    dtype = plain_dtype(config)
    for module in modules(tensors, ".weight_packed"):
        packed = tensors[f"{module}.weight_packed"]
        scale = part(tensors, f"{module}.weight_scale")
        parts = {"weight": packed, "scale": scale}
        parts |= some(
            tensors,
            module,
            zeros="weight_zero_point",
            groups="weight_g_idx",
            global_scale="weight_global_scale",
            shape="weight_shape",
        )
        if packed.dtype == "I32":
            shape = _int64s(read(part(tensors, f"{module}.weight_shape")))
            bits = _bits(packed.shape[-1], shape[-1], module)
            yield Packed(
                name=f"{module}.weight",
                scheme="ct-packed",
                shape=shape,
                dtype=dtype,
                parts=parts,
                options={"bits": bits},
            )
        elif packed.dtype == "U8" and scale.dtype == "F8_E4M3" and "global_scale" in parts:
            shape = (*packed.shape[:-1], packed.shape[-1] * 2)
            yield Packed(
                name=f"{module}.weight", scheme="nvfp4", shape=shape, dtype=dtype, parts=parts
            )
        else:
            raise undecodable(f"{packed.name} has the unsupported packed dtype {packed.dtype}")
    for name, info in tensors.items():
        if name.endswith(".weight") and info.dtype in ("I8", *FLOAT8):
            yield _scaled(name, info, tensors, dtype, _block_structure(settings))


def _block_structure(settings: Mapping[str, Any]) -> Any:
    groups = (settings.get("config_groups") or {}).values()
    weights = [group.get("weights") or {} for group in groups if isinstance(group, Mapping)]
    return next((w["block_structure"] for w in weights if w.get("block_structure")), None)


def fp8(
    config: Mapping[str, Any], settings: Mapping[str, Any], tensors: Tensors, _read: ReadBytes
) -> Iterator[Packed]:
    """Yield the weights stored as 8-bit floats."""
    block = settings.get("weight_block_size")
    for name, info in tensors.items():
        if info.dtype in FLOAT8:
            yield _scaled(name, info, tensors, plain_dtype(config), block)


def _scaled(name: str, info: TensorInfo, tensors: Tensors, dtype: str, block: Any = None) -> Packed:
    """Describe an 8-bit weight with a scale per tensor, row, group or block."""
    module = name.removesuffix(".weight")
    stem = f"{module}.weight" if name.endswith(".weight") else name
    parts = {"weight": info}
    for suffix in ("_scale_inv", "_scale"):
        if scale := tensors.get(f"{stem}{suffix}"):
            parts["scale"] = scale
            break
    else:
        raise undecodable(f"{name} ({info.dtype}) has no scale")
    parts |= some(tensors, module, zeros="weight_zero_point", groups="weight_g_idx")
    return Packed(
        name=name,
        scheme="scaled",
        shape=info.shape,
        dtype=dtype,
        parts=parts,
        options={"block": list(block) if block else None},
    )


def mxfp4(
    config: Mapping[str, Any], _settings: Any, tensors: Tensors, _read: ReadBytes
) -> Iterator[Packed]:
    """Yield the experts stored as MXFP4."""
    for name in modules(tensors, "_blocks"):
        parts = {"weight": tensors[f"{name}_blocks"], "scale": part(tensors, f"{name}_scales")}
        shape = parts["weight"].shape
        if len(shape) != 4 or shape[:3] != parts["scale"].shape:
            raise undecodable(f"{name}_blocks has the unexpected shape {list(shape)}")
        # transformers stores experts as (expert, in, out).
        yield Packed(
            name=name,
            scheme="mxfp4",
            shape=(shape[0], shape[2] * shape[3] * 2, shape[1]),
            dtype=plain_dtype(config),
            parts=parts,
        )


def _bits(words: int, columns: int, module: str) -> int:
    """Return the bits per code of `columns` codes packed in 32-bit words without gaps."""
    for bits in range(2, 9):
        if words == -(-columns * bits // 32):
            return bits
    raise undecodable(f"{module}.weight_packed has {words} words for {columns} columns")


def _int64s(data: bytes) -> tuple[int, ...]:
    return tuple(
        int.from_bytes(data[i : i + 8], "little", signed=True) for i in range(0, len(data), 8)
    )
