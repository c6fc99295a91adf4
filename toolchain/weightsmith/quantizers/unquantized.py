"""Matrices kept in 16 bits: the recipe's `keep`, and its form in each layout.

By suffix, and fused ones together: engines fuse Q, K and V, and gate and up, and do not start with
a checkpoint that keeps part of a group in 16 bits.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from weightsmith.core.errors import InputRefused, UsageError
from weightsmith.core.values import Json
from weightsmith.models.tensors import CheckpointTensors
from weightsmith.quantizers.checkpoints import LINEAR
from weightsmith.quantizers.matrices import FUSED, Matrix

_FUSED = {name: FUSED[name] for name in ("qkv_proj", "gate_up_proj")}
MATRICES = (*_FUSED["qkv_proj"], "o_proj", *_FUSED["gate_up_proj"], "down_proj")
_ALWAYS = "lm_head"
"""Never quantized, so listing it has no effect."""


def keep_option(requested: Mapping[str, Json]) -> list[str]:
    """Return `quantize.keep` of a recipe, sorted.

    Raises UsageError for unknown matrices, for only some of the matrices that engines fuse, and if
    nothing would be quantized.
    """
    keep = sorted(set(requested.get("keep") or ()) - {_ALWAYS})
    for end in keep:
        stem, _, name = end.rpartition(".")
        if name not in MATRICES:
            raise UsageError(
                f"keep: {end!r} is not the suffix of a matrix name",
                hint=f"use {', '.join(MATRICES)}, or e.g. layers.0.mlp.down_proj",
            )
        for fused in _FUSED.values():
            missing = [s for s in fused if name in fused and f"{stem}.{s}".lstrip(".") not in keep]
            if missing:
                raise UsageError(
                    f"keep: engines fuse {', '.join(fused)}, so they must have the same type; "
                    f"{end} is listed without {', '.join(missing)}",
                    hint="list all of them, or none",
                )
    if set(MATRICES) <= set(keep):
        raise UsageError(
            "keep lists every matrix: nothing would be quantized",
            hint="list fewer, or serve the model in 16 bits",
        )
    return keep


def kept_modules(model: Path, keep: Sequence[str]) -> list[str]:
    """Return a checkpoint's modules that match `keep`, sorted."""
    linear = (n.removesuffix(".weight") for n in CheckpointTensors(model).names if LINEAR.search(n))
    return sorted(module for module in linear if is_kept(module, keep))


def without_kept(known: Sequence[Matrix], keep: Sequence[str]) -> list[Matrix]:
    """Return the matrices of a checkpoint that are quantized.

    Raises InputRefused for names in `keep` that match nothing, and if nothing is left.
    """
    for end in keep:
        if not any(is_kept(matrix.module, [end]) for matrix in known):
            raise InputRefused(
                f"keep: no matrix has a name that ends in {end!r}",
                hint=f"remove it; the names are like {known[-1].module if known else ''}",
            )
    found = [matrix for matrix in known if not is_kept(matrix.module, keep)]
    if not found:
        raise InputRefused(
            "keep lists every matrix of the model: nothing would be quantized"
            if known
            else "no tensor of the checkpoint is a matrix of a decoder layer",
            hint="list fewer, or serve the model in 16 bits",
        )
    return found


def is_kept(module: str, keep: Iterable[str]) -> bool:
    """Return whether a module's name has a suffix in `keep`, at a dot."""
    return any(module == end or module.endswith(f".{end}") for end in keep)


def negative_patterns(keep: Sequence[str]) -> dict[str, Json]:
    """Return GPTQ's `dynamic`: regular expressions for the modules that are not quantized.

    Engines match the names of fused matrices, so these have their own expressions.
    """
    ends = set(keep)
    for end in keep:
        stem, _, name = end.rpartition(".")
        for fused, parts in _FUSED.items():
            if name in parts:
                ends.add(f"{stem}.{fused}".lstrip("."))
    return {rf"-:(.*\.)?{re.escape(end)}$": {} for end in sorted(ends)}
