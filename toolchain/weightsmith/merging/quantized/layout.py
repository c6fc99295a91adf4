"""Map the stored tensors of a quantized checkpoint to its weights; no torch, no dequantization."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from weightsmith.core.errors import InputRefused
from weightsmith.merging.quantized.bitsandbytes import bitsandbytes
from weightsmith.merging.quantized.integer_layouts import awq, gptq
from weightsmith.merging.quantized.packed import (
    FLOAT8,
    HINT,
    Packed,
    ReadBytes,
    Tensors,
    undecodable,
)
from weightsmith.merging.quantized.scaled_layouts import compressed, fp8, mxfp4

_ACTIVATION = ("input_scale", "activation_scale", "output_scale", "k_scale", "v_scale", "q_scale")
_ACTIVATION_MORE = ("input_zero_point", "input_global_scale", "input_scale_ub")


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedLayout:
    """The quantized weights and unused tensors of a checkpoint."""

    method: str
    """Its name in config.json, such as `bitsandbytes`."""
    packed: Mapping[str, Packed]
    """Weight -> how it is stored."""
    dropped: frozenset[str]
    """Stored tensors used only in quantized inference, such as activation scales."""

    def owners(self) -> dict[str, str]:
        """Return the weight that each stored tensor belongs to."""
        return {
            part.name: weight.name
            for weight in self.packed.values()
            for part in weight.parts.values()
        }


def quantization_of(config: Mapping[str, Any], tensors: Tensors) -> str:
    """Return the quantization method from the configuration, else from the tensors; "" if none.

    An unknown method is returned by its name.
    """
    settings = config.get("quantization_config") or config.get("compression_config")
    if settings:
        method = str(settings.get("quant_method", "")) if isinstance(settings, Mapping) else ""
        known = {"compressed_tensors": "compressed-tensors", "gptqmodel": "gptq"}
        if (
            not method
            and isinstance(settings, Mapping)
            and settings.get("load_in_4bit") is not None
        ):
            return "bitsandbytes"
        return known.get(method, method) or "unknown"
    for name, info in tensors.items():
        if ".quant_state." in name or name.endswith((".SCB", ".absmax", ".quant_map")):
            return "bitsandbytes"
        if name.endswith((".qweight", ".qzeros")):
            return "gptq or awq"
        if name.endswith(".weight_packed"):
            return "compressed-tensors"
        if info.dtype in FLOAT8:
            return "fp8"
    return ""


def read_layout(config: Mapping[str, Any], tensors: Tensors, read: ReadBytes) -> QuantizedLayout:
    """Return how each quantized weight is stored, and which tensors a plain checkpoint omits.

    Raises InputRefused for unsupported methods and variants, and for missing parts.
    """
    method = quantization_of(config, tensors)
    settings = config.get("quantization_config") or config.get("compression_config") or {}
    find = _FINDERS.get(method)
    if find is None:
        raise InputRefused(
            f"the base is quantized with {method!r}, which cannot be dequantized",
            hint=f"{HINT}; supported are {', '.join(sorted(_FINDERS))}",
        )
    found = {weight.name: weight for weight in find(config, settings, tensors, read)}
    used = {part.name for weight in found.values() for part in weight.parts.values()}
    unused = {
        name
        for name in tensors.keys() - used
        if name.rpartition(".")[2] in (*_ACTIVATION, *_ACTIVATION_MORE)
    }
    _check_rest(tensors, used | unused, found, method)
    return QuantizedLayout(method=method, packed=found, dropped=frozenset(unused))


def _check_rest(tensors: Tensors, used: set[str], found: Mapping[str, Any], method: str) -> None:
    """Refuse tensors that look quantized but belong to no known weight."""
    for name, info in tensors.items():
        if name in used:
            continue
        quantized = info.dtype in ("F4", "F6_E2M3", "F6_E3M2", *FLOAT8, "I8", "U8", "I32")
        if quantized and len(info.shape) > 1:
            raise undecodable(f"{name} ({info.dtype}) is not part of a known {method} weight")
        if name in found:
            raise undecodable(f"{name} is stored twice, plain and quantized")


_Finder = Callable[[Mapping[str, Any], Any, Tensors, ReadBytes], Iterator[Packed]]
_FINDERS: dict[str, _Finder] = {
    "bitsandbytes": bitsandbytes,
    "gptq": gptq,
    "awq": awq,
    "compressed-tensors": compressed,
    "fp8": fp8,
    "fbgemm_fp8": fp8,
    "mxfp4": mxfp4,
}
