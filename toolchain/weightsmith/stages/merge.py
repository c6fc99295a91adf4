"""Sources -> Checkpoint: merge adapters into the base in a builder, rounding once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import TypeAlias

from weightsmith.checkpoints.without_data import UnwrittenTree
from weightsmith.destinations import Destination, InFolder
from weightsmith.job_inputs import Input
from weightsmith.jobs import MergeJob
from weightsmith.merge_options import Merge
from weightsmith.merging.combining.combination import Combination
from weightsmith.merging.plan import MergePlan, can_be_virtual, estimate, make_plan
from weightsmith.outcome import Outcome, Timer
from weightsmith.ports import Entry, Store
from weightsmith.resources import builder_pins
from weightsmith.time_limits import job_seconds
from weightsmith.tools import Tools
from weightsmith.values import (
    Checkpoint,
    Computed,
    Digest,
    FileEntry,
    Json,
    Sources,
    StageInputs,
)

BUILDER = "merge"
RECIPE_NUMBER = 4
_MEMORY_BYTES = 2 << 30
"""Smallest memory limit of the merge container; a sum of deltas needs only a fraction of it."""


def inputs(sources: Sources, options: Merge, *, unwritten: bool = False) -> StageInputs:
    """Return everything that the merged checkpoint depends on.

    One without weights in its files is another entry of the store.
    """
    return StageInputs(
        stage="merge",
        recipe_number=RECIPE_NUMBER,
        inputs={
            "base": sources.base.digest,
            "adapters": [a.snapshot.digest for a in sources.adapters],
            "weights": [a.weight for a in sources.adapters],
            **asdict(options.as_done),
            "builder": builder_pins(BUILDER),
            **({"unwritten": True} if unwritten else {}),
        },
    )


def find(sources: Sources, options: Merge, store: Store, *, files: bool) -> Checkpoint | None:
    """Return the store's merged checkpoint; one without weights will do unless `files`."""
    if written := store.find(inputs(sources, options).key):
        return Checkpoint(tree=written.tree, details=written.meta)
    if files or not (made := store.find(inputs(sources, options, unwritten=True).key)):
        return None
    return _unwritten(made, sources, options)


def _unwritten(made: Entry, sources: Sources, options: Merge) -> Checkpoint:
    """Return a checkpoint whose files have no weights, with the digests of files that have them."""
    details = dict(made.meta)
    largest = details.pop("largest", {})  # older entries have none
    files = tuple(
        FileEntry(path=f["path"], size=f["size"], digest=Digest(f"sha256:{f['sha256']}"))
        for f in details.pop("files")
    )
    return Checkpoint(
        tree=UnwrittenTree(files, made.tree),
        details=details,
        computed=Computed(
            tree=made.tree,
            sources=sources,
            merge=asdict(options.as_done),
            largest=largest,
        ),
    )


def memory_limit(cost: Mapping[str, int]) -> int:
    """Return the merge container's memory limit: twice the planned memory, as a margin.

    Methods that vote or prune keep a tensor's whole deltas in memory, one per adapter.
    """
    return max(_MEMORY_BYTES, 2 * cost["peak_memory_bytes"])


def check(sources: Sources, options: Merge, *, files: bool = True) -> Mapping[str, int]:
    """Return the cost of a merge; refuse what the merge would refuse, reading only headers.

    The keys are `read_bytes`, `write_bytes` and `peak_memory_bytes`. Raises InputRefused.
    """
    cost, virtual = _cost(*_planned_of(sources, options))
    return {**cost, "write_bytes": 0} if virtual and not files else cost


_PlannedOf: TypeAlias = tuple[Path, tuple[tuple[Path, float], ...], tuple[Digest, ...], Merge]
"""What decides a plan: base, adapters with their weights, the digests of all, how to merge."""


def _planned_of(sources: Sources, options: Merge) -> _PlannedOf:
    adapters = tuple((a.snapshot.tree.root, a.weight) for a in sources.adapters)
    digests = (sources.base.digest, *(a.snapshot.digest for a in sources.adapters))
    return sources.base.tree.root, adapters, digests, options


@lru_cache(maxsize=100_000)
def _cost(*planned_of: *_PlannedOf) -> tuple[Mapping[str, int], bool]:
    """Return a plan's cost, and whether it can be virtual; a fleet asks first for all cells."""
    plan = _planned(*planned_of)
    return estimate(plan), can_be_virtual(plan)


@lru_cache(maxsize=1)
def _planned(
    base: Path,
    adapters: tuple[tuple[Path, float], ...],
    _digests: tuple[Digest, ...],
    options: Merge,
) -> MergePlan:
    """Return the plan of files with these digests; a build asks for it more than once."""
    return make_plan(
        base,
        adapters,
        dtype=options.dtype,
        combination=Combination.of(options),
        quantized_base=options.quantized_base,
    )


def merge(
    sources: Sources, options: Merge, to: Destination, tools: Tools, *, files: bool = True
) -> Outcome[Checkpoint]:
    """Return the merged checkpoint; without adapters, the unchanged base.

    Without `files`, nobody needs its weights as files: unless they are there already, they are
    computed, checked and hashed, but not written if they can be computed where they are read.
    Raises InputRefused if any key of an adapter does not fit the base.
    """
    timer = Timer("merge", f"{len(sources.adapters)} adapter(s), {options.method}", tools)
    if options.precision == "fast":
        tools.progress.warn("merge.precision: fast is the same as exact now")
    if not sources.adapters:
        base = Checkpoint(tree=sources.base.tree)
        return timer.done(base, cached=True)
    there = to.find(lambda: inputs(sources, options))
    unwritten = not files and not there and _cost(*_planned_of(sources, options))[1]
    made = to.files(
        lambda: inputs(sources, options, unwritten=unwritten),
        lambda folder: _run(folder, sources, options, tools, unwritten=unwritten),
        resume=True,
    )
    checkpoint = Checkpoint(tree=made.tree, details=made.meta)
    if unwritten:
        checkpoint = _unwritten(made, sources, options)
    return timer.done(checkpoint, cached=made.cached)


def combine(sources: Sources, options: Merge, to: InFolder, tools: Tools) -> Outcome[Checkpoint]:
    """Write the combined adapters as one adapter, into a folder of the user's.

    Raises UsageError for methods whose result is not an adapter, InputRefused for inputs with more
    than plain low-rank factors.
    """
    timer = Timer("merge", f"{len(sources.adapters)} adapter(s) into one", tools)
    files = to.files(
        lambda: inputs(sources, options),
        lambda folder: _run(folder, sources, options, tools, keep_adapter=True),
    )
    adapter = Checkpoint(tree=files.tree, details=files.meta)
    return timer.done(adapter, cached=files.cached)


def _run(
    folder: Path,
    sources: Sources,
    options: Merge,
    tools: Tools,
    *,
    keep_adapter: bool = False,
    unwritten: bool = False,
) -> Mapping[str, Json]:
    cost = check(sources, options, files=not unwritten)
    written = 0 if keep_adapter else cost["write_bytes"]
    tools.store.require_room(written, "the merged checkpoint")
    tools.runner.prepare(BUILDER, tools.progress)
    job = MergeJob(
        builder=BUILDER,
        base=Input.tree(sources.base.tree),
        adapters=tuple(Input.tree(a.snapshot.tree) for a in sources.adapters),
        weights=tuple(a.weight for a in sources.adapters),
        options=options.as_done,
        keep_adapter=keep_adapter,
        unwritten=unwritten,
        output=folder,
        memory_bytes=memory_limit(cost),
        seconds=job_seconds(cost["read_bytes"]),
        use_gpu=True,
    )
    result = dict(tools.runner.run(job, tools.progress))
    result.pop("out", None)
    if unwritten:
        return result
    files = result.pop("files", [])
    return {**result, "sha256": {f["path"]: f["sha256"] for f in files}}
