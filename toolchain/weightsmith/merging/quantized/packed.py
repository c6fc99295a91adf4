"""One quantized weight, and the tensors that store it; no torch, no dequantization."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from weightsmith.core.errors import InputRefused
from weightsmith.core.values import JsonValue
from weightsmith.models.safetensors import TensorInfo

Tensors = Mapping[str, TensorInfo]
ReadBytes = Callable[[TensorInfo], bytes]
"""Reads a small tensor's bytes."""

DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
FLOAT8 = ("F8_E4M3", "F8_E5M2")
HINT = "merge onto the original 16-bit checkpoint instead"


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """One quantized weight."""

    name: str
    """Its name in an unquantized checkpoint."""
    scheme: str
    """A key of `decode.DECODERS`."""
    shape: tuple[int, ...]
    dtype: str
    """Safetensors dtype of the dequantized weight."""
    parts: Mapping[str, TensorInfo]
    """Part -> stored tensor; `weight` has the codes, and its position in the file is used."""
    options: Mapping[str, Any] = field(default_factory=dict)


def plain_dtype(config: Mapping[str, JsonValue], fallback: str = "BF16") -> str:
    """Return the configuration's dtype of unquantized weights."""
    text = config.get("text_config")
    nested = text.get("dtype", text.get("torch_dtype")) if isinstance(text, Mapping) else None
    stated = config.get("dtype", config.get("torch_dtype", nested))
    return DTYPES.get(str(stated).removeprefix("torch."), fallback)


def modules(tensors: Tensors, suffix: str) -> list[str]:
    """Return the names of modules with a tensor of this suffix."""
    return [name.removesuffix(suffix) for name in tensors if name.endswith(suffix)]


def some(tensors: Tensors, module: str, **names: str) -> dict[str, TensorInfo]:
    """Return those of a module's optional parts that exist."""
    return {part: info for part, name in names.items() if (info := tensors.get(f"{module}.{name}"))}


def part(tensors: Tensors, name: str) -> TensorInfo:
    """Return a tensor; raise InputRefused if it is missing."""
    if name not in tensors:
        raise undecodable(f"{name} is missing")
    return tensors[name]


def undecodable(what: str) -> InputRefused:
    """Return the error for a weight that cannot be dequantized."""
    return InputRefused(f"the quantized base cannot be dequantized: {what}", hint=HINT)
