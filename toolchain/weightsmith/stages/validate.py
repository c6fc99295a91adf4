"""Checkpoint -> validated Checkpoint: compare the merged weights with base and adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from weightsmith.destinations import Documents
from weightsmith.errors import CheckFailed
from weightsmith.job_inputs import Input, Virtual
from weightsmith.jobs import Mixture, ValidateJob
from weightsmith.merge_options import Merge
from weightsmith.merging.combining.combination import PRUNING, SUMS
from weightsmith.outcome import Outcome, Timer
from weightsmith.resources import builder_pins
from weightsmith.time_limits import job_seconds
from weightsmith.tools import Tools
from weightsmith.validating.result import Validation
from weightsmith.values import Checkpoint, Digest, Json, Sources, StageInputs, key_of

BUILDER = "merge"
RECIPE_NUMBER = 2
MEMORY_BYTES = 4 << 30
"""Container's memory limit, without a checkpoint that must be loaded whole."""
_RESULT = "validation.json"
_SHOWN = 3

Messages = Sequence[Mapping[str, str]]


def inputs(
    sources: Sources, options: Merge, checkpoint: Digest, items: Sequence[Messages]
) -> StageInputs:
    """Return everything that the result of a validation depends on."""
    return StageInputs(
        stage="validate",
        recipe_number=RECIPE_NUMBER,
        inputs={
            "base": sources.base.digest,
            "adapters": [a.snapshot.digest for a in sources.adapters],
            "weights": [a.weight for a in sources.adapters],
            "scope": scope(options.method, options.space, options.quantized_base),
            "mixture": mixture(options.method, options.space, options.density, options.rank),
            "checkpoint": checkpoint,
            "probes": key_of([[dict(message) for message in item] for item in items]),
            "builder": builder_pins(BUILDER),
        },
    )


def scope(method: str, space: str, quantized_base: str) -> str:
    """Return how much of a merge with these options can be checked against base and adapters.

    `all` for a weighted sum; `rest`, the tensors that no adapter changes, for other methods;
    `files` if every layer was first rounded to four bits.
    """
    if quantized_base.startswith("simulate"):
        return "files"
    return "all" if method in SUMS and space == "delta" else "rest"


def mixture(
    method: str, space: str, density: float | None, rank: int | None
) -> Mapping[str, Json] | None:
    """Return a method's selection of deltas for the job; None if it cannot be checked.

    DARE divides the kept deltas by the density, so it needs one.
    """
    if space == "delta" and method == "svd":
        return {"truncates": True, "rank": rank}
    if method not in PRUNING or space != "delta" or (method.startswith("dare") and not density):
        return None
    gain = 1 / density if density and method.startswith("dare") else 1.0
    return {"gain": gain, "mean": method.endswith("ties")}


def validate(
    checkpoint: Checkpoint,
    sources: Sources,
    options: Merge,
    items: Sequence[Messages],
    to: Documents,
    tools: Tools,
) -> Outcome[Validation]:
    """Return what comparing a checkpoint with base and adapters found.

    Raises CheckFailed, with the whole result as details, if it differs from base and adapters.
    """
    timer = Timer("validate", "merged weights against base and adapters", tools)
    found = to.document(
        lambda: inputs(sources, options, checkpoint.digest, items),
        _RESULT,
        lambda folder: _run(folder, checkpoint, sources, options, items, tools).to_json(),
        resume=True,  # of the reference answers that the same job finds
    )
    return timer.done(Validation.from_json(found.value), cached=found.cached)


def _require_passed(result: Validation) -> None:
    """Raise CheckFailed with the worst findings of a result that did not pass."""
    if result.passed:
        return
    errors = [found.message for found in result.errors]
    more = f"\n  … and {len(errors) - _SHOWN} more" if len(errors) > _SHOWN else ""
    lines = "".join(f"\n  {message}" for message in errors[:_SHOWN])
    raise CheckFailed(
        f"the merged checkpoint differs from base and adapters:{lines}{more}",
        hint="merge the same inputs again; if that fails too, an input does not match its "
        "configuration, or this machine's disk or memory is faulty",
        details=result.to_json(),
    )


def _run(
    folder: Path,
    checkpoint: Checkpoint,
    sources: Sources,
    options: Merge,
    items: Sequence[Messages],
    tools: Tools,
) -> Validation:
    tools.runner.prepare(BUILDER, tools.progress)
    size = checkpoint.tree.weight_bytes
    mixed = mixture(options.method, options.space, options.density, options.rank)
    job = ValidateJob(
        builder=BUILDER,
        base=Input.tree(sources.base.tree),
        merged=Input.checkpoint(checkpoint),
        virtual=Virtual.of(checkpoint),
        adapters=tuple(Input.tree(a.snapshot.tree) for a in sources.adapters),
        weights=tuple(a.weight for a in sources.adapters),
        chats=tuple(tuple(item) for item in items),
        scope=scope(options.method, options.space, options.quantized_base),
        mixture=Mixture(**mixed) if mixed else None,
        output=folder,
        # Only architectures that cannot be streamed need more than a fraction of this.
        memory_bytes=MEMORY_BYTES + 5 * size,
        seconds=job_seconds(sources.base.tree.weight_bytes + size),
        use_gpu=True,
    )
    result = Validation.from_json(tools.runner.run(job, tools.progress))
    _require_passed(result)
    for found in result.warnings:
        tools.progress.warn(found.message)
    return result
