"""Sources -> Checkpoint: adapters merged into the base, in a builder, rounded once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from weightsmith.merging.combining.combination import Combination
from weightsmith.merging.plan import estimate, make_plan
from weightsmith.ports import Entry
from weightsmith.recipe import Merge
from weightsmith.resources import builder_pins
from weightsmith.time_limits import job_seconds
from weightsmith.tools import Tools
from weightsmith.values import Checkpoint, Job, Json, Sources, StageInputs

BUILDER = "merge"
RECIPE_NUMBER = 1
_MEMORY_BYTES = 2 << 30
"""Least limit of the merge container; a sum of deltas needs a fraction, whatever the model."""


def inputs(sources: Sources, options: Merge) -> StageInputs:
    """Return all that the merged checkpoint depends on."""
    return StageInputs(
        stage="merge",
        recipe_number=RECIPE_NUMBER,
        inputs={
            "base": sources.base.digest,
            "adapters": [a.snapshot.digest for a in sources.adapters],
            "weights": [a.weight for a in sources.adapters],
            **parameters(options),
            "builder": builder_pins(BUILDER),
        },
    )


def parameters(options: Merge) -> dict[str, Json]:
    """Return what the options tell the merge job, and what its result depends on."""
    return {
        "method": options.method,
        "density": options.density,
        "rank": options.rank,
        "seed": options.seed,
        "space": options.space,
        "dtype": options.dtype,
        "precision": options.precision,
        "quantized_base": options.quantized_base,
    }


def combination_of(options: Merge) -> Combination:
    """Return how the adapters become one; raises UsageError where parameters do not fit."""
    return Combination(
        method=options.method,
        density=options.density,
        rank=options.rank,
        seed=options.seed,
        space=options.space,
    )


def memory_limit(cost: Mapping[str, int]) -> int:
    """Return the limit of the merge container: twice what the plan needs, for what it cannot see.

    Methods that vote or prune hold whole deltas of one tensor, one per adapter.
    """
    return max(_MEMORY_BYTES, 2 * cost["peak_memory_bytes"])


def check(sources: Sources, options: Merge) -> Mapping[str, int]:
    """Refuse, from headers alone, what the merge would refuse; return what it will cost.

    Bytes: `read_bytes`, `write_bytes`, `peak_memory_bytes`. Raises InputRefused.
    """
    adapters = [(a.snapshot.tree.root, a.weight) for a in sources.adapters]
    plan = make_plan(
        sources.base.tree.root,
        adapters,
        dtype=options.dtype,
        combination=combination_of(options),
        quantized_base=options.quantized_base,
    )
    return estimate(plan, exact=options.precision == "exact")


def merge(sources: Sources, options: Merge, tools: Tools) -> Checkpoint:
    """Return the merged checkpoint; without adapters, the base as it is.

    Raises InputRefused where an adapter does not fit the base in every key.
    """
    if not sources.adapters:
        return Checkpoint(tree=sources.base.tree, made_from=(sources.base.digest,))
    stage = inputs(sources, options)
    entry = tools.store.find(stage.key)
    if entry is None:
        entry = tools.store.produce(
            stage.key,
            {"stage": "merge", "inputs": stage.inputs},
            lambda folder: _run(folder, sources, options, tools),
            resume=True,
        )
    return found(sources, entry)


def found(sources: Sources, entry: Entry) -> Checkpoint:
    """Return the checkpoint that a store entry holds."""
    made_from = (sources.base.digest, *(a.snapshot.digest for a in sources.adapters))
    return Checkpoint(
        tree=entry.tree, made_from=made_from, details={**entry.meta, "cached": entry.cached}
    )


def _run(folder: Path, sources: Sources, options: Merge, tools: Tools) -> Mapping[str, Json]:
    cost = check(sources, options)
    tools.store.require_room(cost["write_bytes"], "the merged checkpoint")
    tools.runner.prepare(BUILDER, tools.progress)
    names = [f"adapter{i}" for i in range(len(sources.adapters))]
    adapters = {n: a.snapshot.tree.root for n, a in zip(names, sources.adapters, strict=True)}
    result = dict(
        tools.runner.run(
            Job(
                stage="merge",
                builder=BUILDER,
                inputs={"base": sources.base.tree.root, **adapters},
                parameters={
                    "adapters": names,
                    "weights": [a.weight for a in sources.adapters],
                    **parameters(options),
                    "device": "auto",
                    "own_out": True,
                },
                output=folder,
                memory_bytes=memory_limit(cost),
                seconds=job_seconds(cost["read_bytes"]),
                use_gpu=True,
            ),
            tools.progress,
        )
    )
    files = result.pop("files", [])
    result.pop("out", None)
    return {**result, "sha256": {f["path"]: f["sha256"] for f in files}}
