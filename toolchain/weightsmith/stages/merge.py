"""Sources -> Checkpoint: merge adapters into the base in a builder, rounding once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from weightsmith.destinations import Destination, InFolder
from weightsmith.jobs import Input, MergeJob
from weightsmith.merge_options import Merge
from weightsmith.merging.combining.combination import Combination
from weightsmith.merging.plan import estimate, make_plan
from weightsmith.outcome import Outcome, Timer
from weightsmith.resources import builder_pins
from weightsmith.time_limits import job_seconds
from weightsmith.tools import Tools
from weightsmith.values import Checkpoint, Json, Sources, StageInputs

BUILDER = "merge"
RECIPE_NUMBER = 1
_MEMORY_BYTES = 2 << 30
"""Smallest memory limit of the merge container; a sum of deltas needs only a fraction of it."""


def inputs(sources: Sources, options: Merge) -> StageInputs:
    """Return everything that the merged checkpoint depends on."""
    return StageInputs(
        stage="merge",
        recipe_number=RECIPE_NUMBER,
        inputs={
            "base": sources.base.digest,
            "adapters": [a.snapshot.digest for a in sources.adapters],
            "weights": [a.weight for a in sources.adapters],
            **asdict(options.as_done),
            "builder": builder_pins(BUILDER),
        },
    )


def memory_limit(cost: Mapping[str, int]) -> int:
    """Return the merge container's memory limit: twice the planned memory, as a margin.

    Methods that vote or prune keep a tensor's whole deltas in memory, one per adapter.
    """
    return max(_MEMORY_BYTES, 2 * cost["peak_memory_bytes"])


def check(sources: Sources, options: Merge) -> Mapping[str, int]:
    """Return the cost of a merge; refuse what the merge would refuse, reading only headers.

    The keys are `read_bytes`, `write_bytes` and `peak_memory_bytes`. Raises InputRefused.
    """
    adapters = [(a.snapshot.tree.root, a.weight) for a in sources.adapters]
    plan = make_plan(
        sources.base.tree.root,
        adapters,
        dtype=options.dtype,
        combination=Combination.of(options),
        quantized_base=options.quantized_base,
    )
    return estimate(plan)


def merge(sources: Sources, options: Merge, to: Destination, tools: Tools) -> Outcome[Checkpoint]:
    """Return the merged checkpoint; without adapters, the unchanged base.

    Raises InputRefused if any key of an adapter does not fit the base.
    """
    timer = Timer("merge", f"{len(sources.adapters)} adapter(s), {options.method}", tools)
    if options.precision == "fast":
        tools.progress.warn("merge.precision: fast is the same as exact now")
    if not sources.adapters:
        base = Checkpoint(tree=sources.base.tree)
        return timer.done(base, cached=True)
    files = to.files(
        lambda: inputs(sources, options),
        lambda folder: _run(folder, sources, options, tools),
        resume=True,
    )
    checkpoint = Checkpoint(tree=files.tree, details=files.meta)
    return timer.done(checkpoint, cached=files.cached)


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
    folder: Path, sources: Sources, options: Merge, tools: Tools, *, keep_adapter: bool = False
) -> Mapping[str, Json]:
    cost = check(sources, options)
    tools.store.require_room(0 if keep_adapter else cost["write_bytes"], "the merged checkpoint")
    tools.runner.prepare(BUILDER, tools.progress)
    job = MergeJob(
        builder=BUILDER,
        base=Input.tree(sources.base.tree),
        adapters=tuple(Input.tree(a.snapshot.tree) for a in sources.adapters),
        weights=tuple(a.weight for a in sources.adapters),
        options=options.as_done,
        keep_adapter=keep_adapter,
        output=folder,
        memory_bytes=memory_limit(cost),
        seconds=job_seconds(cost["read_bytes"]),
        use_gpu=True,
    )
    result = dict(tools.runner.run(job, tools.progress))
    files = result.pop("files", [])
    result.pop("out", None)
    return {**result, "sha256": {f["path"]: f["sha256"] for f in files}}
