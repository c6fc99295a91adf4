"""How a checkpoint's weights are packed, according to `quantization_config`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from weightsmith.core.values import JsonValue


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """The layout of quantized weights."""

    method: str
    """`quant_method`, such as `awq`, `gptq`, `fp8` or `compressed-tensors`; "" if it is not set."""
    bits: int
    """Bits per weight; 4 if it is not set, 0 if it is invalid."""
    group_size: int
    """Weights per scale; -1 for a whole row."""
    symmetric: bool
    reordered: bool
    """GPTQ's `desc_act`: columns are ordered by activations."""
    block: tuple[int, ...]
    """`weight_block_size`: rows and columns per scale; () if it is not set."""
    kinds: frozenset[str]
    """Kinds of Format with which it can be served; empty if no target supports it."""

    @classmethod
    def of(cls, value: JsonValue) -> Packing | None:
        """Read a `quantization_config`; return None if the weights are not quantized."""
        if not value:
            return None
        settings = value if isinstance(value, Mapping) else {}
        method, block = str(settings.get("quant_method", "")), settings.get("weight_block_size")
        return cls(
            method=method,
            bits=_whole(settings.get("bits", settings.get("w_bit", 4))),
            group_size=_whole(settings.get("group_size", -1)),
            symmetric=settings.get("sym") is not False,
            reordered=settings.get("desc_act") is True,
            block=tuple(map(_whole, block if isinstance(block, list) else [block]))
            if block
            else (),
            kinds=_kinds(method, settings.get("config_groups")),
        )


def _whole(value: JsonValue) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


def _kinds(method: str, groups: JsonValue) -> frozenset[str]:
    """Return the kinds of Format that engines load.

    compressed-tensors with 4-bit weights may be AWQ or GPTQ.
    """
    if method in {"awq", "gptq", "fp8", "mxfp4"}:
        return frozenset({method})
    if method != "compressed-tensors":
        return frozenset()
    found: set[str] = set()
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if not isinstance(weights, Mapping):
            continue
        if weights.get("type") == "float" and weights.get("num_bits") == 8:
            found.add("fp8")
        if weights.get("type") == "float" and weights.get("num_bits") == 4:
            found |= {16: {"nvfp4"}, 32: {"mxfp4"}}.get(_whole(weights.get("group_size")), set())
        if weights.get("type") == "int" and weights.get("num_bits") == 4:
            found |= {"awq", "gptq"}
    return frozenset(found)
