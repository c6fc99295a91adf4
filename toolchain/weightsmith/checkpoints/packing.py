"""How a checkpoint's weights are packed, by what its config.json says."""

from __future__ import annotations

from collections.abc import Mapping

from weightsmith.values import Json


def weight_kinds(config: Mapping[str, Json]) -> frozenset[str]:
    """Return the kinds of Format that a folder of safetensors may be served as.

    compressed-tensors with 4-bit weights is what both AWQ and GPTQ write there; a method that no
    target serves gives an empty set.
    """
    packing = config.get("quantization_config")
    if not isinstance(packing, Mapping):
        return frozenset({"safetensors"})
    method = str(packing.get("quant_method", ""))
    if method in {"awq", "gptq", "fp8"}:
        return frozenset({method})
    if method != "compressed-tensors":
        return frozenset()
    groups = packing.get("config_groups")
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
