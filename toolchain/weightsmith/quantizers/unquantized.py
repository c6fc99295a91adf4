"""Matrices that stay in 16 bits: which a recipe may name, and how each layout records them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from weightsmith.errors import UsageError
from weightsmith.quantizers.checkpoints import LINEAR
from weightsmith.quantizers.tensors import Tensors
from weightsmith.values import Json

_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Matrices that engines put into one, which has one type (packed_modules_mapping of vLLM)."""
MATRICES = (*_FUSED["qkv_proj"], "o_proj", *_FUSED["gate_up_proj"], "down_proj")
_ALWAYS = "lm_head"
"""Never quantized; naming it changes nothing."""


def keep_option(wanted: Mapping[str, Json]) -> list[str]:
    """Return `quantize.keep` of a recipe, sorted.

    Raises UsageError for what names no matrix, for a part of what engines put together, and for
    all matrices, of which none would be left to quantize.
    """
    keep = sorted(set(wanted.get("keep") or ()) - {_ALWAYS})
    for end in keep:
        stem, _, name = end.rpartition(".")
        if name not in MATRICES:
            raise UsageError(
                f"keep: {end!r} is not the end of a matrix's name",
                hint=f"such as {', '.join(MATRICES)}, or layers.0.mlp.down_proj",
            )
        for fused in _FUSED.values():
            missing = [s for s in fused if name in fused and f"{stem}.{s}".lstrip(".") not in keep]
            if missing:
                raise UsageError(
                    f"keep: engines put {', '.join(fused)} together, so they have one type; "
                    f"{end} is named without {', '.join(missing)}",
                    hint="name all of them, or none",
                )
    if set(MATRICES) <= set(keep):
        raise UsageError(
            "keep names every matrix: nothing would be quantized",
            hint="name fewer, or serve the model in 16 bits",
        )
    return keep


def kept_modules(model: Path, keep: Sequence[str]) -> list[str]:
    """Return the modules of a checkpoint whose names end so, in the order of their names."""
    linear = (n.removesuffix(".weight") for n in Tensors(model).names if LINEAR.search(n))
    return sorted(module for module in linear if is_kept(module, keep))


def is_kept(module: str, keep: Iterable[str]) -> bool:
    """Say whether a module's name ends with one of those to keep, at a dot."""
    return any(module == end or module.endswith(f".{end}") for end in keep)


def negative_patterns(keep: Sequence[str]) -> dict[str, Json]:
    """Return GPTQ's `dynamic`: what is not quantized, by expressions that match whole names.

    Engines ask with the name of what they put together, so that has an expression of its own.
    """
    ends = set(keep)
    for end in keep:
        stem, _, name = end.rpartition(".")
        for fused, parts in _FUSED.items():
            if name in parts:
                ends.add(f"{stem}.{fused}".lstrip("."))
    return {rf"-:(.*\.)?{re.escape(end)}$": {} for end in sorted(ends)}
