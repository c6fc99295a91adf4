"""Checkpoint -> validated Checkpoint: compare the merged weights with base and adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from weightsmith.core.errors import CheckFailed
from weightsmith.core.jobs import CombinationRule, Input, ValidateJob, Virtual
from weightsmith.core.merge_options import Merge
from weightsmith.core.resources import builder_pins
from weightsmith.core.time_limits import job_seconds
from weightsmith.core.values import (
    Checkpoint,
    Digest,
    JsonValue,
    Sources,
    StageInputs,
    Writable,
    key_of,
)
from weightsmith.forward.memory import COMPARING, LayerTime, WalkSize, model_pass_bytes
from weightsmith.merging.combining.combination import PRUNING, SUMS
from weightsmith.recipe.file import RecipeFile
from weightsmith.steps.destinations import Documents, InStore
from weightsmith.steps.joined import JoinedJob
from weightsmith.steps.stage_result import StageResult, Timer, unrecorded
from weightsmith.steps.step import (
    Foreseen,
    ForeseenWeights,
    Foresight,
    Results,
    State,
    Step,
)
from weightsmith.steps.tools import Tools
from weightsmith.validating.result import Validation

BUILDER = "merge"
RECIPE_NUMBER = 2
_MEMORY_BYTES = 4 << 30
"""Container's memory limit, without a checkpoint that must be loaded whole."""
_PROBES = 8
_PROBED_TOKENS = _PROBES * (64 + 16)
"""At most eight probes of 64 tokens, and 16 after each."""
_NEW, _FEW_NEW, _LARGE = 16, 4, 10_000_000_000
"""Tokens that are generated after each probe, and fewer for a model with so many weights, as in
`validating/probes.py`, which imports torch."""
_RESULT = "validation.json"
_SHOWN = 3

Messages = Sequence[Mapping[str, str]]


def inputs(
    sources: Sources, options: Merge, checkpoint: Digest, items: Sequence[Messages]
) -> StageInputs:
    """Return everything that the result of a validation depends on."""
    keyed: Mapping[str, JsonValue] | None = None
    if rule := mixture(options.method, options.space, options.density, options.rank):
        keyed = {"gain": rule.gain, "mean": rule.mean}
        keyed = {"truncates": True, "rank": rule.rank} if rule.truncates else keyed
    return StageInputs(
        stage="validate",
        recipe_number=RECIPE_NUMBER,
        inputs={
            "base": sources.base.digest,
            "adapters": [a.snapshot.digest for a in sources.adapters],
            "weights": [a.weight for a in sources.adapters],
            "scope": scope(options.method, options.space, options.quantized_base),
            "mixture": keyed,
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
) -> CombinationRule | None:
    """Return a method's selection of deltas for the job; None if it cannot be checked.

    DARE divides the kept deltas by the density, so it needs one.
    """
    if space == "delta" and method == "svd":
        return CombinationRule(truncates=True, rank=rank)
    if method not in PRUNING or space != "delta" or (method.startswith("dare") and not density):
        return None
    gain = 1 / density if density and method.startswith("dare") else 1.0
    return CombinationRule(gain=gain, mean=method.endswith("ties"))


def validate(
    checkpoint: Checkpoint,
    sources: Sources,
    options: Merge,
    items: Sequence[Messages],
    to: Documents,
    tools: Tools,
    joined: JoinedJob | None = None,
) -> StageResult[Validation]:
    """Return what comparing a checkpoint with base and adapters found; a job may be `joined`.

    Raises CheckFailed, with the whole result as details, if it differs from base and adapters.
    """
    timer = Timer("validate", "merged weights against base and adapters", tools)
    found = to.document(
        partial(inputs, sources, options, checkpoint.digest, items),
        _RESULT,
        partial(_run, checkpoint, sources, options, items, tools, joined),
        resume=True,  # of the reference answers that the same job finds
    )
    result = Validation.from_json(found.value)
    return timer.done(result, cached=found.cached, elsewhere=-joined.seconds if joined else 0.0)


def _run(
    checkpoint: Checkpoint,
    sources: Sources,
    options: Merge,
    items: Sequence[Messages],
    tools: Tools,
    joined: JoinedJob | None,
    folder: Path,
) -> JsonValue:
    tools.runner.prepare(BUILDER, tools.progress)
    size = checkpoint.tree.weight_bytes
    job = ValidateJob(
        builder=BUILDER,
        base=Input.tree(sources.base.tree),
        merged=Input.checkpoint(checkpoint),
        virtual=Virtual.of(checkpoint),
        adapters=tuple(Input.tree(a.snapshot.tree) for a in sources.adapters),
        weights=tuple(a.weight for a in sources.adapters),
        chats=tuple(tuple(item) for item in items),
        scope=scope(options.method, options.space, options.quantized_base),
        mixture=mixture(options.method, options.space, options.density, options.rank),
        output=folder,
        # Only architectures that cannot be streamed need more than a fraction of this.
        memory_bytes=_MEMORY_BYTES + 5 * size,
        seconds=job_seconds(sources.base.tree.weight_bytes + size),
        use_gpu=True,
    )
    told = joined.run_with(job, tools) if joined else tools.runner.run(job, tools.progress)
    result = Validation.from_json(told)
    if not result.passed:
        errors = [found.message for found in result.errors]
        more = f"\n  … and {len(errors) - _SHOWN} more" if len(errors) > _SHOWN else ""
        lines = "".join(f"\n  {message}" for message in errors[:_SHOWN])
        raise CheckFailed(
            f"the merged checkpoint differs from base and adapters:{lines}{more}",
            hint="merge the same inputs again; if that fails too, an input does not match its "
            "configuration, or this machine's disk or memory is faulty",
            details=result.to_json(),
        )
    for found in result.warnings:
        tools.progress.warn(found.message)
    return result.to_json()


@dataclass(frozen=True, eq=False, kw_only=True)
class ValidateStep(Step[Validation | None, None]):
    """Compares what was merged with base and adapters; None if nothing was, or it is off."""

    name = "validate"
    recipe_number = RECIPE_NUMBER
    in_every_plan = True
    allows_prefetch = True
    proves = True
    way_out = "set validate.enabled to false"

    file: RecipeFile
    sources: Step[Sources, Sources]
    checkpoint: Step[Checkpoint, ForeseenWeights]
    merges: bool
    probes: tuple[Messages, ...]
    """() for the built-in ones."""

    @property
    def options(self) -> Writable:
        """What is asked, and whether."""
        recipe = self.file.recipe
        questions = [suite.data for suite in recipe.evaluate[:1]]
        return [recipe.validation.model_dump(mode="json"), questions]

    def foresee(self, seen: Foresight) -> Foreseen[None]:
        """Return its row, if anything is merged and checked."""
        recipe, sources = self.file.recipe, seen[self.sources]
        if not self.merges or not recipe.validation.enabled:
            return Foreseen(value=None)
        checkpoint = seen[self.checkpoint]
        state = State(cached=False, why=checkpoint.missing)
        if checkpoint.tree:
            digest = checkpoint.tree.digest
            state = seen.state(self, inputs(sources, recipe.merge, digest, self.probes))
        read = 2 * sources.base.tree.size + sum(a.snapshot.tree.size for a in sources.adapters)
        # Merged model, base and adapters run side by side.
        adapters = 2 * sum(a.snapshot.tree.weight_bytes for a in sources.adapters)
        walk = WalkSize(views=3, rows=8, tokens=_PROBED_TOKENS, adapter_bytes=adapters)
        memory = model_pass_bytes(checkpoint.model, walk) + COMPARING
        return Foreseen(value=None, rows=(self.row(state, read=read, memory=memory),))

    def run(self, have: Results, tools: Tools) -> StageResult[Validation | None]:
        """Return how it was validated; raises CheckFailed if it differs."""
        recipe = self.file.recipe
        if not self.merges:
            return unrecorded(None)
        if not recipe.validation.enabled:
            tools.progress.warn("validation is off in the recipe: merged weights were not checked")
            return unrecorded(None)
        sources, checkpoint, to = have[self.sources], have[self.checkpoint], InStore(tools.store)
        joined = have.joined.get(self)
        return validate(checkpoint, sources, recipe.merge, self.probes, to, tools, joined)

    def inputs(self, have: Results, _tools: Tools) -> StageInputs | None:
        """Return what the validation depended on."""
        if have[self] is None:
            return None
        digest = have[self.checkpoint].digest
        return inputs(have[self.sources], self.file.recipe.merge, digest, self.probes)

    def failed(self, error: CheckFailed) -> Validation | None:
        """Return what was found, for the record."""
        return Validation.from_json(error.details) if error.details else None

    def seconds(self, layer: LayerTime, seen: Foresight) -> float | None:
        """Return how long the probes take; nothing if nothing is merged."""
        sources, probed = seen[self.sources], 3 * _PROBED_TOKENS
        if not sources.adapters:
            return 0.0
        weights = sources.base.tree.weight_bytes // 2  # in 16 bits
        new = _FEW_NEW if weights > _LARGE else _NEW
        return new * layer.passed(_PROBES, _PROBES) + layer.passed(probed, probed)
