"""Sources -> Artifact: the base and its adapters, neither merged nor copied."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

from weightsmith.core.jobs import ConvertAdaptersJob, Input
from weightsmith.core.resources import builder_pins
from weightsmith.core.time_limits import job_seconds
from weightsmith.core.trees import discard
from weightsmith.core.values import (
    AdapterSnapshot,
    Artifact,
    Checkpoint,
    Digest,
    FileEntry,
    Format,
    JsonValue,
    Sources,
    StageInputs,
    Tree,
    key_of,
    plain,
)
from weightsmith.quantizers import gguf_lora
from weightsmith.steps.destinations import InStore, moved
from weightsmith.steps.served_adapters import FOLDER, served_adapters
from weightsmith.steps.stage_result import StageResult, Timer, unrecorded
from weightsmith.steps.step import (
    WEIGHTS,
    Foreseen,
    ForeseenWeights,
    Foresight,
    Results,
    Step,
    TargetStep,
)
from weightsmith.steps.tools import Tools

_BUILDER = "gguf"
_RECIPE_NUMBER = 2
_AT_ONCE = 256
"""Adapters in one job: a container gets each one's folder by itself."""
_FILES = frozenset({"adapter_config.json", "adapter_model.safetensors"})


def unmerged(sources: Sources, base: Artifact, format_: Format) -> Artifact:
    """Return one tree with the base's files and a folder for each adapter."""
    tree, found = base.tree, served_adapters(sources)
    files = [entry for entry in tree.files if not entry.path.startswith(f"{FOLDER}/")]
    places = dict(tree.places)
    for served, adapter in zip(found, sources.adapters, strict=True):
        own = adapter.snapshot.tree
        for entry in own.files:
            if entry.path in _FILES:
                path = f"{served.folder}/{entry.path}"
                files.append(replace(entry, path=path))
                places[path] = own.path(entry.path)
    return _together(base, files, places, format_)


def unmerged_gguf(
    sources: Sources, base: Artifact, format_: Format, tools: Tools
) -> StageResult[Artifact]:
    """Return one tree with a GGUF base and its adapters, converted in their builder.

    One job makes all adapters that are missing. It holds its first adapter's lock in the store
    while it stores the others. All builds take the locks in the order of the keys, so that no two
    of them wait for each other.
    """
    timer = Timer(WEIGHTS, f"{len(sources.adapters)} adapter(s) to GGUF", tools)
    served = served_adapters(sources, gguf=True)
    store, made = InStore(tools.store), False
    wanted = {_inputs(sources, one).key: one for one in sources.adapters}
    while left := sorted(key for key in wanted if not tools.store.find(key)):
        missing = {key: wanted[key] for key in left[:_AT_ONCE]}
        first = partial(_inputs, sources, next(iter(missing.values())))
        make = partial(_make, sources, missing, tools)
        made |= not store.files(first, make, resume=True).cached
    files, places = list(base.tree.files), dict(base.tree.places)
    for one, adapter in zip(served, sources.adapters, strict=True):
        if tree := store.find(partial(_inputs, sources, adapter)):
            (entry,) = (entry for entry in tree.files if entry.path == gguf_lora.FILE)
            files.append(replace(entry, path=one.folder))
            places[one.folder] = tree.path(entry.path)
    return timer.done(_together(base, files, places, format_), cached=not made)


def _together(
    base: Artifact, files: Iterable[FileEntry], places: Mapping[str, Path], format_: Format
) -> Artifact:
    ordered = tuple(sorted(files, key=lambda one: one.path))
    tree = Tree(root=base.tree.root, files=ordered, places=places)
    return Artifact(format=format_, tree=tree, details=base.details)


def _make(
    sources: Sources, missing: Mapping[Digest, AdapterSnapshot], tools: Tools, folder: Path
) -> Mapping[str, JsonValue]:
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


@dataclass(frozen=True, eq=False, kw_only=True)
class BaseAloneStep(TargetStep[Sources, Sources]):
    """The sources without the adapters, for what is made of the base alone."""

    name = "base-alone"

    sources: Step[Sources, Sources]

    @cached_property
    def derivation(self) -> Digest:
        """What tells bases apart: a fleet quantizes one for all adapters of it."""
        return key_of([self.name, plain(self.file.recipe.base.model_dump())])

    def foresee(self, seen: Foresight) -> Foreseen[Sources]:
        """Return the base."""
        return Foreseen(value=replace(seen[self.sources], adapters=()))

    def run(self, have: Results, _tools: Tools) -> StageResult[Sources]:
        """Return the base."""
        return unrecorded(replace(have[self.sources], adapters=()))


@dataclass(frozen=True, eq=False, kw_only=True)
class BaseStep(TargetStep[Checkpoint, ForeseenWeights]):
    """The base as a checkpoint."""

    name = "unmerged-base"

    sources: Step[Sources, Sources]

    def foresee(self, seen: Foresight) -> Foreseen[ForeseenWeights]:
        """Return the base."""
        return Foreseen(value=ForeseenWeights.of(seen[self.sources].base.tree))

    def run(self, have: Results, _tools: Tools) -> StageResult[Checkpoint]:
        """Return the base."""
        return unrecorded(Checkpoint(tree=have[self.sources].base.tree))


@dataclass(frozen=True, eq=False, kw_only=True)
class UnmergedStep(TargetStep[Artifact, ForeseenWeights]):
    """Puts base and adapters beside each other."""

    name = WEIGHTS
    recipe_number = _RECIPE_NUMBER
    in_every_plan = True

    sources: Step[Sources, Sources]
    base: Step[Artifact, ForeseenWeights]
    """The base in the target's format."""

    def foresee(self, seen: Foresight) -> Foreseen[ForeseenWeights]:
        """Return the base's weights; the adapters are planned where they are served."""
        return Foreseen(value=seen[self.base])

    def permit(self, seen: Foresight) -> None:
        """Raise InputRefused for a base that cannot be made in the target's format."""
        self.base.permit(seen)

    def builders(self) -> tuple[str, ...]:
        """Return the base's builders, and that of converted adapters."""
        return (*self.base.builders(), *((_BUILDER,) if self._converts else ()))

    @property
    def _converts(self) -> bool:
        return "gguf" in self.of.target.engine.accepts

    def run(self, have: Results, tools: Tools) -> StageResult[Artifact]:
        """Return base and adapters as one tree."""
        sources, base, format_ = have[self.sources], have[self.base], self.of.target.format
        if self._converts:
            return unmerged_gguf(sources, base, format_, tools)
        return Timer(WEIGHTS, format_.name, tools).done(
            unmerged(sources, base, format_), cached=True
        )
