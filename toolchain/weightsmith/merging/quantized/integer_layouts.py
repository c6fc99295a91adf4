"""Weights of GPTQ and AWQ: `qweight`, `qzeros` and `scales`.

Sources: AutoGPTQ and GPTQModel `qlinear`, AutoAWQ `WQLinear_GEMM`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from weightsmith.merging.quantized.packed import (
    Packed,
    ReadBytes,
    Tensors,
    modules,
    part,
    plain_dtype,
    undecodable,
)
from weightsmith.models.safetensors import TensorInfo


def gptq(
    config: Mapping[str, Any], settings: Mapping[str, Any], tensors: Tensors, _read: ReadBytes
) -> Iterator[Packed]:
    """Yield the weights that GPTQ quantized."""
    bits = int(settings.get("bits", 4))
    form = str(settings.get("checkpoint_format", "gptq"))
    if form not in ("gptq", "gptq_v2"):
        raise undecodable(f"unsupported GPTQ format {form!r}, packed for one kernel")
    for module in modules(tensors, ".qweight"):
        parts = _integer_parts(tensors, module)
        if "groups" not in parts and settings.get("desc_act"):
            raise undecodable(f"{module} has no g_idx, but the configuration sets desc_act")
        rows, columns = parts["weight"].shape
        yield Packed(
            name=f"{module}.weight",
            scheme="gptq",
            shape=(columns, rows * 32 // bits),
            dtype=plain_dtype(config, parts["scale"].dtype),
            parts=parts,
            options={
                "bits": bits,
                "group_size": int(settings.get("group_size", -1)),
                # The first format stores zero points minus one.
                "zero_offset": 1 if form == "gptq" else 0,
            },
        )


def awq(
    config: Mapping[str, Any], settings: Mapping[str, Any], tensors: Tensors, _read: ReadBytes
) -> Iterator[Packed]:
    """Yield the weights that AWQ quantized."""
    form, bits = str(settings.get("version", "gemm")).lower(), int(settings.get("bits", 4))
    if form not in ("gemm", "gemv") or bits != 4:
        raise undecodable(
            f"unsupported AWQ version {form!r} with {bits} bits, packed for one kernel"
        )
    group = int(settings.get("group_size", settings.get("q_group_size", -1)))
    for module in modules(tensors, ".qweight"):
        parts = _integer_parts(tensors, module)
        first, second = parts["weight"].shape
        shape = (second * 8, first) if form == "gemm" else (first, second * 8)
        size = group if group > 0 else shape[1]
        if form == "gemv" and (shape[1] % size or parts["scale"].shape[-1] < shape[1] // size):
            raise undecodable(
                f"{module} has {shape[1]} inputs, not a multiple of the group size {size}"
            )
        yield Packed(
            name=f"{module}.weight",
            scheme=f"awq-{form}",
            shape=shape,
            dtype=plain_dtype(config, parts["scale"].dtype),
            parts=parts,
            options={"bits": bits, "group_size": size},
        )


def _integer_parts(tensors: Tensors, module: str) -> dict[str, TensorInfo]:
    parts = {
        "weight": part(tensors, f"{module}.qweight"),
        "zeros": part(tensors, f"{module}.qzeros"),
        "scale": part(tensors, f"{module}.scales"),
    }
    if parts["weight"].dtype != "I32" or len(parts["weight"].shape) != 2:
        raise undecodable(f"{module}.qweight has dtype {parts['weight'].dtype}, not int32")
    groups = tensors.get(f"{module}.g_idx")
    return parts | ({"groups": groups} if groups else {})
