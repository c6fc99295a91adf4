"""How a checkpoint's weights are packed, by config.json's `quantization_config`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from weightsmith.values import Json


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """Weights that a quantizer packed."""

    method: str
    """`quant_method`, such as `awq`, `gptq`, `fp8` or `compressed-tensors`; "" for none."""
    bits: int
    """Bits of a weight; 4 where the configuration does not say, 0 for what is no number."""
    group_size: int
    """Weights that share a scale; -1 for a whole row."""
    symmetric: bool
    reordered: bool
    """GPTQ's `desc_act`: columns are ordered by their activations."""
    block: tuple[int, ...]
    """`weight_block_size`: rows and columns that share a scale; () for none."""
    kinds: frozenset[str]
    """Kinds of Format that the folder may be served as; empty for what no target serves."""

    @classmethod
    def of(cls, value: Json) -> Packing | None:
        """Read a `quantization_config`; None where the weights are not packed."""
        if not value:
            return None
        told = value if isinstance(value, Mapping) else {}
        method, block = str(told.get("quant_method", "")), told.get("weight_block_size")
        return cls(
            method=method,
            bits=_whole(told.get("bits", told.get("w_bit", 4))),
            group_size=_whole(told.get("group_size", -1)),
            symmetric=told.get("sym") is not False,
            reordered=told.get("desc_act") is True,
            block=tuple(map(_whole, block if isinstance(block, list) else [block]))
            if block
            else (),
            kinds=_kinds(method, told.get("config_groups")),
        )


def _whole(value: Json) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


def _kinds(method: str, groups: Json) -> frozenset[str]:
    """Return what an engine may load it as.

    compressed-tensors with 4-bit weights is what both AWQ and GPTQ write there.
    """
    if method in {"awq", "gptq", "fp8"}:
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
        if weights.get("type") == "int" and weights.get("num_bits") == 4:
            found |= {"awq", "gptq"}
    return frozenset(found)
