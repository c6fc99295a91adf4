"""A base of which only the configuration is here: its files as they will be, and its merge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod
from pathlib import Path

from weightsmith.checkpoints.facts import ModelFacts, read_facts
from weightsmith.checkpoints.folder import check_model_folder, pickles_in
from weightsmith.checkpoints.safetensors import read_header
from weightsmith.foreign import INDEX, parse_file
from weightsmith.merge_options import Merge
from weightsmith.merging.adapter_config import read_adapter_config
from weightsmith.merging.combining.combination import SUMS, Combination
from weightsmith.merging.plan import BLOCK_BYTES, START_BYTES
from weightsmith.merging.quantized.choice import refuse, simulates
from weightsmith.serving.parameters import NO_WEIGHTS, parameters, weights_from_config
from weightsmith.stages import merge as merging
from weightsmith.values import FileEntry, Sources, Tree, UnreadDigest

INDEX_FILE = "model.safetensors.index.json"
FROM_INDEX = f"{NO_WEIGHTS}{INDEX_FILE}'s"
FROM_CONFIG = f"{NO_WEIGHTS}worked out from config.json, an estimate"
_SHARD = 5_000_000_000
"""The largest file that transformers writes."""


class ForeseenTree(Tree):
    """A folder without weights, and the files that will hold them."""

    __slots__ = ()


def foreseen(sources: Sources) -> tuple[Sources, str]:
    """Return the sources with the base's weights by their expected size, and where that is from.

    They are returned as they are, with "", if the weights are there. Raises InputRefused for a size
    that cannot be worked out, and for weights that are there as pickles.
    """
    tree = sources.base.tree
    if tree.weight_bytes:
        return sources, ""
    if pickles_in(tree.root):
        check_model_folder(tree.root)
    size, note = expected_weights(tree.root, read_facts(tree.root))
    count = -(-size // _SHARD)
    weights = tuple(
        FileEntry(
            path=f"model-{number:05}-of-{count:05}.safetensors",
            size=size * number // count - size * (number - 1) // count,
            digest=UnreadDigest.of(b"%d of %d" % (number, size)),
        )
        for number in range(1, count + 1)
    )
    whole = ForeseenTree(root=tree.root, files=(*tree.files, *weights), places=tree.places)
    return replace(sources, base=replace(sources.base, tree=whole)), note


def expected_weights(folder: Path, model: ModelFacts) -> tuple[int, str]:
    """Return the bytes of the weights that a folder lacks, and a note that says how it is known.

    Raises InputRefused if neither its index nor its config.json says.
    """
    if size := _indexed_bytes(folder / INDEX_FILE):
        return size, FROM_INDEX
    return weights_from_config(model), FROM_CONFIG


def _indexed_bytes(path: Path) -> int:
    """Return the size of the shards in bytes from the index; 0 if the index does not have it."""
    try:
        size = parse_file(path, largest=INDEX)["metadata"]["total_size"]
    except (OSError, ValueError, KeyError, TypeError):
        return 0
    return size if isinstance(size, int) and not isinstance(size, bool) and size > 0 else 0


def merge_cost(sources: Sources, options: Merge, *, files: bool = True) -> Mapping[str, int]:
    """Return what `stages.merge.check` returns and refuse what it refuses.

    Without the base's weights it is an estimate, and whether the adapters fit is not known.
    """
    tree = sources.base.tree
    if not isinstance(tree, ForeseenTree):
        return merging.check(sources, options, files=files)
    Combination.of(options)
    model, choice = read_facts(tree.root), options.quantized_base
    if model.packing and choice != "dequantize":
        raise refuse(tree.root, model.packing.method, simulates=simulates(choice))
    adapters = [adapter.snapshot.tree for adapter in sources.adapters]
    configured = [read_adapter_config(adapter.root) for adapter in adapters]
    summed = options.method in SUMS and all(one.kind == "LORA" for one in configured)
    summed = summed and not any(one.raw.get("use_dora") for one in configured)
    virtual = summed and not (files or model.packing or simulates(choice))
    plain = 2 * parameters(model).all if model.packing else tree.weight_bytes
    held = sum(map(_largest_factors, adapters)) * 12  # in float32, and their norms
    if not summed:
        held = 8 * len(adapters) * model.shape.hidden * model.shape.intermediate
    return {
        "read_bytes": tree.size + sum(adapter.size for adapter in adapters),
        "write_bytes": 0 if virtual else tree.size - tree.weight_bytes + plain,
        "peak_memory_bytes": START_BYTES + BLOCK_BYTES + held,
    }


def _largest_factors(adapter: Tree) -> int:
    """Return the most numbers of an adapter that change one matrix."""
    modules: dict[str, int] = {}
    for tensor in read_header(adapter.path("adapter_model.safetensors")).tensors:
        module = tensor.name.partition(".lora_")[0]
        modules[module] = modules.get(module, 0) + prod(tensor.shape)
    return max(modules.values(), default=0)
