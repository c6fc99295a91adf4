"""Sources -> Artifact: the base and its adapters, neither merged nor copied."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache, partial
from math import prod
from pathlib import Path

from weightsmith.checkpoints.safetensors import read_header
from weightsmith.destinations import InStore, moved
from weightsmith.errors import InputRefused, UsageError
from weightsmith.foreign import read_json
from weightsmith.job_inputs import Input
from weightsmith.jobs import ConvertAdaptersJob
from weightsmith.outcome import Outcome, Timer
from weightsmith.quantizers import gguf_lora
from weightsmith.resources import builder_pins
from weightsmith.serving.engine import ServedAdapter
from weightsmith.time_limits import job_seconds
from weightsmith.tools import Tools
from weightsmith.trees import discard
from weightsmith.values import (
    LORA,
    AdapterSnapshot,
    Artifact,
    Digest,
    FileEntry,
    Json,
    Sources,
    StageInputs,
    Tree,
)

FOLDER = "adapters"
"""Subfolder of the base that contains the adapters."""

_BUILDER = "gguf"
_RECIPE_NUMBER = 2
_AT_ONCE = 256
"""Adapters in one job: a container gets each one's folder by itself."""
_EXPERT = re.compile(r"\.experts\.\d+\.")
_FILES = frozenset({"adapter_config.json", "adapter_model.safetensors"})


def unmerged(sources: Sources) -> Artifact:
    """Return one tree with the base's files and a folder for each adapter."""
    base, found = sources.base.tree, served_adapters(sources)
    files = [entry for entry in base.files if not entry.path.startswith(f"{FOLDER}/")]
    places: dict[str, Path] = {}
    for served, adapter in zip(found, sources.adapters, strict=True):
        tree = adapter.snapshot.tree
        for entry in tree.files:
            if entry.path in _FILES:
                path = f"{served.folder}/{entry.path}"
                files.append(FileEntry(path=path, size=entry.size, digest=entry.digest))
                places[path] = tree.path(entry.path)
    tree = Tree(
        root=base.root, files=tuple(sorted(files, key=lambda entry: entry.path)), places=places
    )
    return Artifact(format=LORA, tree=tree)


def unmerged_gguf(
    sources: Sources, converted: Outcome[Artifact], tools: Tools
) -> Outcome[Artifact]:
    """Return one tree with a GGUF base and its adapters, converted in their builder."""
    timer = Timer("quantize", f"{len(sources.adapters)} adapter(s) to GGUF", tools)
    base, served = converted.value, served_adapters(sources, gguf=True)
    files, places = list(base.tree.files), {}
    adapters, made = _converted(sources, tools)
    for one, tree in zip(served, adapters, strict=True):
        (entry,) = (entry for entry in tree.files if entry.path == gguf_lora.FILE)
        files.append(FileEntry(path=one.folder, size=entry.size, digest=entry.digest))
        places[one.folder] = tree.path(entry.path)
    tree = Tree(
        root=base.tree.root, files=tuple(sorted(files, key=lambda e: e.path)), places=places
    )
    outcome = timer.done(Artifact(format=LORA, tree=tree), cached=converted.cached and not made)
    return replace(outcome, seconds=round(outcome.seconds + converted.seconds, 3))


def _converted(sources: Sources, tools: Tools) -> tuple[list[Tree], bool]:
    """Return each adapter as GGUF, and whether any was made; one job makes all that are missing.

    It holds its first adapter's lock in the store while it stores the others. All builds take the
    locks in the order of the keys, so that no two of them wait for each other.
    """
    store, made = InStore(tools.store), False
    wanted = {_inputs(sources, one).key: one for one in sources.adapters}
    while left := sorted(key for key in wanted if not tools.store.find(key)):
        missing = {key: wanted[key] for key in left[:_AT_ONCE]}
        first = next(iter(missing.values()))
        make = partial(_make, sources, missing, tools)
        made |= not store.files(partial(_inputs, sources, first), make, resume=True).cached
    found = (store.find(partial(_inputs, sources, one)) for one in sources.adapters)
    return [tree for tree in found if tree], made


def _make(
    sources: Sources, missing: Mapping[Digest, AdapterSnapshot], tools: Tools, folder: Path
) -> Mapping[str, Json]:
    """Convert adapters in one job; store all but the first, and leave this one in the folder."""
    trees = {key.hex: one.snapshot.tree for key, one in missing.items()}
    tools.runner.prepare(_BUILDER, tools.progress)
    job = ConvertAdaptersJob(
        builder=_BUILDER,
        base=Input.tree(sources.base.tree),
        adapters=tuple(map(Input.tree, trees.values())),
        folders=tuple(trees),
        output=folder,
        memory_bytes=4 << 30,
        seconds=job_seconds(sum(tree.size for tree in trees.values())),
    )
    result = tools.runner.run(job, tools.progress)
    first, *others = missing.items()
    facts = {key: {**result, "tensors": result["tensors"][key.hex]} for key in missing}
    for key, one in others:
        made = moved(folder / key.hex, facts[key])
        InStore(tools.store).files(partial(_inputs, sources, one), made)
        discard(folder / key.hex)
    moved(folder / first[0].hex, {})(folder)
    for path in list(folder.iterdir()):
        if path.is_dir():  # also of adapters that a killed run converted and this one lacks
            discard(path)
    return facts[first[0]]


def _inputs(sources: Sources, adapter: AdapterSnapshot) -> StageInputs:
    return StageInputs(
        stage="convert-adapter",
        recipe_number=_RECIPE_NUMBER,
        inputs={
            "base": sources.base.digest,
            "adapter": adapter.snapshot.digest,
            "builder": builder_pins(_BUILDER),
        },
    )


def base_weight_bytes(artifact: Artifact) -> int:
    """Return the bytes of an artifact's weights, without adapters that lie beside them."""
    own = artifact.tree
    if artifact.format == LORA:
        base = (entry for entry in own.files if not entry.path.startswith(f"{FOLDER}/"))
        own = replace(own, files=tuple(base))
    return own.weight_bytes


def served_adapters(sources: Sources, *, gguf: bool = False) -> tuple[ServedAdapter, ...]:
    """Return each adapter's name, rank, size, and folder (or file, as `gguf`) in the image.

    A single adapter has no own name: it is served under the model's name. Raises UsageError if
    there is none or one has a weight, InputRefused for adapters that engines cannot apply at run
    time.
    """
    if not sources.adapters:
        raise UsageError("no adapter to serve with the base", hint="add an adapter to the recipe")
    found: list[ServedAdapter] = []
    for adapter in sources.adapters:
        if adapter.weight != 1.0:
            raise UsageError(
                f"adapter {adapter.snapshot.source} has weight {adapter.weight}, but engines"
                " apply it at full weight",
                hint="merge it, or remove the weight",
            )
        name = _name(adapter)
        place = f"{FOLDER}/{name}.gguf" if gguf else f"{FOLDER}/{name}"
        if any(other.folder == place for other in found):
            raise UsageError(f"two adapters are named {name}", hint="give them different versions")
        rank = _rank(adapter, gguf=gguf)
        tree = adapter.snapshot.tree
        count, size = _weights(tree.path("adapter_model.safetensors"), tree.digest, gguf=gguf)
        alone = len(sources.adapters) == 1
        served = ServedAdapter(
            name="" if alone else name,
            folder=place,
            rank=rank,
            matrices=count,
            weight_bytes=size,
        )
        found.append(served)
    return tuple(found)


@lru_cache(maxsize=8192)
def _weights(path: Path, _digest: Digest, *, gguf: bool) -> tuple[int, int]:
    """Return the matrices that an adapter changes, and its bytes; as GGUF, all are in float32.

    Engines stack a layer's experts, so that these are one matrix.
    """
    tensors = read_header(path).tensors
    changed = {_EXPERT.sub(".experts.", one.name.partition(".lora_")[0]) for one in tensors}
    return len(changed), sum(4 * prod(one.shape) if gguf else one.size for one in tensors)


def _name(adapter: AdapterSnapshot) -> str:
    """Return an adapter's name for clients: the last part of its source, and its version."""
    last = adapter.snapshot.source.rstrip("/").rpartition("/")[2]
    name = f"{last}-{adapter.version}" if adapter.version else last
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "adapter"


def _rank(adapter: AdapterSnapshot, *, gguf: bool) -> int:
    path = adapter.snapshot.tree.path("adapter_config.json")
    config = read_json(path)
    for key, wrong in (("use_dora", True), ("lora_bias", True)):
        if config.get(key) is wrong:
            raise InputRefused(f"{path}: engines do not serve {key} unmerged", hint="merge it")
    # One factor for all layers: vLLM takes alpha / r of the configuration, llama.cpp alpha over
    # each tensor's own rank.
    scaled = ("alpha_pattern", "use_rslora") if gguf else ("alpha_pattern", "rank_pattern")
    for key in scaled:
        if config.get(key):
            raise InputRefused(
                f"{path}: this engine does not support the scaling by {key}",
                hint="merge it",
            )
    if config.get("bias", "none") != "none" or config.get("modules_to_save"):
        raise InputRefused(
            f"{path}: the adapter replaces parts of the base, which engines cannot do unmerged",
            hint="merge it",
        )
    targets = config.get("target_modules")
    if isinstance(targets, list) and {"embed_tokens", "lm_head"} & set(targets):
        raise InputRefused(
            f"{path}: it changes embeddings, which engines cannot do unmerged", hint="merge it"
        )
    ranks = [config.get("r"), *dict(config.get("rank_pattern") or {}).values()]
    if not all(isinstance(rank, int) and 0 < rank <= 10_000 for rank in ranks):
        raise InputRefused(
            f"{path}: r is {config.get('r')!r}, which is not a valid rank",
            hint="export the adapter again with PEFT's save_pretrained",
        )
    return max(int(rank) for rank in ranks)
