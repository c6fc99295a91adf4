"""What a target's weights are made from, before there is a merged checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, replace

from weightsmith.checkpoints.facts import ModelFacts, read_facts
from weightsmith.merge_options import Merge
from weightsmith.planning.foreseen import merge_cost
from weightsmith.serving.targets import Target
from weightsmith.values import LORA, Sources


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """A checkpoint: the base's facts, plain where a merge dequantizes it; sizes in bytes."""

    model: ModelFacts
    size: int
    """Of all files."""
    weight_bytes: int


def origin_of(target: Target, sources: Sources, options: Merge) -> Origin:
    """Return what a target is made from; raises what `merge_cost` raises."""
    tree = sources.base.tree
    model = read_facts(tree.root)
    unmerged = target.format == LORA or not sources.adapters
    if unmerged or options.quantized_base != "dequantize" or model.packing is None:
        return Origin(model=model, size=tree.size, weight_bytes=tree.weight_bytes)
    # Twice the size of fp8 files and four times that of 4-bit ones, and no longer what they are.
    written = merge_cost(sources, options)["write_bytes"]
    return Origin(model=replace(model, packing=None), size=written, weight_bytes=written)
