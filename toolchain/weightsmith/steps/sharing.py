"""How many of an image's weights other images of the same base have too, and how many are its own.

Weights lie in files that are cut by kind of matrix (`models/reshard.py`). A file is an image's own
if any of its tensors may depend on the adapters.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from math import prod

from weightsmith.core.merge_options import Merge
from weightsmith.core.values import Artifact, FileEntry, Format, Sources
from weightsmith.merging.adapter_config import read_adapter_config
from weightsmith.models.reshard import (
    WORTH_IT,
    Resharded,
    WeightBytes,
    cut,
    is_numbered,
    kind_of,
    module_of,
    repeated_bytes,
)
from weightsmith.models.safetensors import BITS, read_header
from weightsmith.oci.weights import fastest_layer
from weightsmith.quantizers import of_format
from weightsmith.quantizers.matrices import FUSED
from weightsmith.steps.drafting import FOLDER as DRAFT
from weightsmith.steps.merge_plans import MergePlans, PlannedMerge
from weightsmith.steps.served_adapters import FOLDER
from weightsmith.steps.sizes import ForeseenTree, kept_bytes
from weightsmith.steps.step import ForeseenWeights

_WEIGHTS = (".safetensors", ".gguf")
_EXPERTS = re.compile(r"\.(?:experts|block_sparse_moe)\..*")
_PARTS = re.compile("|".join(rf"\.{part}$" for parts in FUSED.values() for part in parts))
_WHOLE = {f".{part}": f".{whole}" for whole, parts in FUSED.items() for part in parts}


def sharing(split: Resharded, artifact: Artifact, apart: frozenset[str]) -> WeightBytes:
    """Return how the bytes of an image's weights files are divided, without those that draft.

    `apart` are tensors of the merged checkpoint that other images of its base do not have.
    """
    own = own_files(split, artifact, apart)
    sizes = {file.path: file.size for file in _weights(split)}
    shared = sum(size for path, size in sizes.items() if path not in own)
    return WeightBytes(shared_bytes=shared, own_bytes=sum(sizes.values()) - shared)


def own_files(split: Resharded, artifact: Artifact, changed: frozenset[str]) -> frozenset[str]:
    """Return the weights files of an image with tensors that may depend on the adapters.

    `changed` are tensors of the merged checkpoint; none, if nothing is merged.
    """
    depends = depends_on_adapters(artifact.format, changed)
    kinds = {kind_of(name) for name in changed}
    parts = _parts(artifact)

    def own(path: str) -> bool:
        if path in parts and kinds.isdisjoint(parts.get("", ())):
            return not kinds.isdisjoint(parts[path])
        if (names := split.tensors.get(path)) is not None:
            return any(map(depends, names))
        # It was not cut: an adapter, a GGUF file, a checkpoint of a few kilobytes.
        return bool(changed) or path.startswith(f"{FOLDER}/")

    return frozenset(filter(own, (file.path for file in _weights(split))))


def _weights(split: Resharded) -> list[FileEntry]:
    """Return the files with the model's weights: what drafts for it is the same whatever it is."""
    files = (file for file in split.tree.files if file.path.endswith(_WEIGHTS))
    return [file for file in files if not file.path.startswith(f"{DRAFT}/")]


def _parts(artifact: Artifact) -> Mapping[str, frozenset[str]]:
    """Return the kinds of tensors in each part of a GGUF file that was cut; {} if none was.

    What a shared cache says is not trusted to have these types.
    """
    found = artifact.details.get("kinds")
    rows = found.items() if isinstance(found, Mapping) else ()
    return {file: frozenset(map(str, kinds)) for file, kinds in rows if isinstance(kinds, list)}


def foreseen_sharing(
    merges: MergePlans,
    sources: Sources,
    options: Merge,
    format_: Format,
    weights: ForeseenWeights,
    largest: Callable[[int], int] | None,
    *,
    by_kind: bool,
) -> WeightBytes:
    """Return what `sharing` will return, without the headers of the files.

    `weights` are the target's; `largest` is what `reshard` gets, or None if files stay whole;
    `by_kind` says whether GGUF files are cut, with importance measured on the base. It
    is an estimate for packed formats, and where the base's weights are not here. Raises
    InputRefused as the merge does.
    """
    total = weights.weight_bytes
    if format_.unmerged or not sources.adapters:
        added = sum(a.snapshot.tree.weight_bytes for a in sources.adapters)
        return WeightBytes(shared_bytes=total, own_bytes=added)
    own = total
    if format_.suffix == ".gguf":
        largest = fastest_layer if by_kind else None
    if largest is not None:
        if isinstance(sources.base.tree, ForeseenTree):
            own = _own_by_keys(sources, format_, weights)
        else:
            own = _own_by_headers(merges.planned(sources, options), format_, largest)
    own = min(own, total)
    return WeightBytes(shared_bytes=total - own, own_bytes=own)


def _own_by_headers(planned: PlannedMerge, format_: Format, largest: Callable[[int], int]) -> int:
    bits = int(16 * format_.bits_per_weight)
    tensors = [
        replace(one, size=one.size * bits // (16 * BITS[one.dtype]))
        if format_.packed and one.dimensions > 1 and is_numbered(one.name)
        else one
        for one in planned.tensors
    ]
    # GGUF files are cut only where no importance depends on the adapters.
    gguf = format_.suffix == ".gguf"
    depends = planned.apart.__contains__ if gguf else depends_on_adapters(format_, planned.apart)
    if not gguf and sum(one.size for one in tensors) < WORTH_IT:
        return sum(one.size for one in tensors)
    files = cut(tensors, largest(repeated_bytes(tensors)))
    own = (group for group in files.values() if any(depends(one.name) for one in group))
    return sum(one.size for group in own for one in group)


def _own_by_keys(sources: Sources, format_: Format, weights: ForeseenWeights) -> int:
    """Return the bytes of the matrices that the adapters' keys name; all for other methods."""
    everything, width = weights.weight_bytes, 4 if weights.model.stated_dtype == "float32" else 2
    gguf = format_.suffix == ".gguf"
    if format_.packed and not (gguf or of_format(format_.name).data_free):
        return everything - kept_bytes(sources.base.tree.weight_bytes, format_, weights.model)
    found: dict[str, int] = {}
    for adapter in sources.adapters:
        tree = adapter.snapshot.tree
        sides: dict[str, dict[str, int]] = {}
        for tensor in read_header(tree.path("adapter_model.safetensors")).tensors:
            module, _, factor = tensor.name.partition(".lora_")
            if factor.startswith(("A", "embedding_A")):
                sides.setdefault(module, {})["A"] = prod(tensor.shape[1:])
            elif factor.startswith(("B", "embedding_B")):
                sides.setdefault(module, {})["B"] = tensor.shape[0]
            elif not factor:
                found[module] = tensor.size
        stacked = any(module.endswith(("experts", "experts.base_layer")) for module in sides)
        config = read_adapter_config(tree.root)
        if stacked or config.kind != "LORA" or config.raw.get("layer_replication"):
            return everything
        found |= {module: prod(both.values()) * width for module, both in sides.items()}
    own = sum(found.values())
    return int(own * format_.bits_per_weight / 16) if format_.packed else own


def depends_on_adapters(format_: Format, changed: frozenset[str]) -> Callable[[str], bool]:
    """Return what says whether a tensor of a format may depend on the adapters.

    `changed` are tensors of the merged checkpoint.
    """
    if not (format_.packed and changed):
        return changed.__contains__
    quantizer = of_format(format_.name)
    fused = quantizer.fused_scales(format_)
    modules = {_rounded_with(name, fused=fused) for name in changed}
    # Calibration measures the merged model, so every matrix depends on all others.
    all_layers = not quantizer.data_free
    return lambda name: (
        (all_layers and is_numbered(name)) or _rounded_with(name, fused=fused) in modules
    )


def _rounded_with(name: str, *, fused: bool) -> str:
    """Return what has the same name for tensors that are rounded together.

    Experts have other names in some formats, so those of a layer are one.
    """
    module = _EXPERTS.sub("", module_of(name))
    return _PARTS.sub(lambda part: _WHOLE[part[0]], module) if fused else module
