"""Explains a build (`plan`): which steps are cached, why others are not, and what they take."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypedDict

from weightsmith.building.checks import (
    check_assembly,
    check_places,
    check_suites,
    warn_of_answers,
)
from weightsmith.building.choosing import foreseen_choice
from weightsmith.building.graph import foresee, peak_memory, temporary_bytes
from weightsmith.building.pipeline import BuildSteps, steps_of
from weightsmith.building.request import BuildRequest
from weightsmith.core.errors import InputRefused
from weightsmith.core.jobs import Input, LayerTimeJob
from weightsmith.core.time_limits import job_seconds
from weightsmith.core.values import JsonValue, Sources
from weightsmith.evaluating.bench_files import ResultsFile
from weightsmith.evaluating.build_record import read_build
from weightsmith.evaluating.results import check_contamination
from weightsmith.forward.memory import LayerTime
from weightsmith.recipe.file import RecipeFile
from weightsmith.serving.targets import Target
from weightsmith.stages.bake import largest_file, layer_limit
from weightsmith.stages.merge import find
from weightsmith.stages.resolve import NotHere
from weightsmith.steps.outputs import ImageOutputs
from weightsmith.steps.sharing import foreseen_sharing
from weightsmith.steps.step import AnyStep, Foresight, PlanRow, State
from weightsmith.steps.tools import Tools

_NOWHERE = ImageOutputs()
_UNKNOWN = "its inputs are not known before `resolve`"


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildPlan:
    """A build as it is foreseen."""

    request: BuildRequest
    steps: BuildSteps
    seen: Foresight | None
    """None if sources are not on this machine."""
    missing: str = ""
    """Which."""

    @property
    def rows(self) -> tuple[PlanRow, ...]:
        """The rows of all steps, in their order."""
        return self.rows_of(self.steps)

    def rows_of(self, steps: Iterable[AnyStep]) -> tuple[PlanRow, ...]:
        """Return the rows of some steps."""
        if self.seen:
            return tuple(row for step in steps for row in self.seen.rows(step))
        found: dict[tuple[str, str], PlanRow] = {}
        for step in steps:
            if step.in_every_plan:
                why = self.missing if step is self.steps.sources else _UNKNOWN
                row = step.row(State(cached=False, why=why))
                found.setdefault((row.stage, row.target), row)
        return tuple(found.values())


def plan_of(request: BuildRequest, tools: Tools) -> BuildPlan:
    """Return what a build would do, without doing it.

    Raises what the build would raise before its first long step, except for lack of memory, which
    the rows show, and for what only a registry or a hub can say.
    """
    check_places(request)
    request = request.pinned()
    steps = steps_of(request)
    check_contamination(request.file, steps.tasks, tools.progress)
    try:
        seen = foresee(steps, tools, earlier=_earlier(steps))
    except NotHere as why:
        return BuildPlan(request=request, steps=steps, seen=None, missing=str(why))
    check_suites(request, steps, seen)
    warn_of_answers(request, steps, seen)
    check_assembly(request, steps, seen)
    return BuildPlan(request=request, steps=steps, seen=seen)


def forecast(
    file: RecipeFile,
    targets: Sequence[Target],
    dist: Path,
    tools: Tools,
    *,
    outputs: ImageOutputs = _NOWHERE,
    locked: bool = False,
    update_lock: bool = False,
    bench_results: tuple[ResultsFile, ...] = (),
    measure: bool = False,
    auto: bool = False,
) -> Mapping[str, JsonValue]:
    """Return stages, serving plans and totals of a build, as `plan --json` prints them.

    With `measure`, one layer of the model is timed, and rows have `seconds`. Sizes are in bytes.
    With `auto`, `auto` has the candidates in the order of trying; if no other target is named, the
    rest is about the first of them. Raises what `plan_of` raises.
    """
    request = BuildRequest(
        file=file,
        targets=tuple(targets),
        outputs=outputs,
        dist=dist,
        engine_answers=tools.images_in_engine,
        locked=locked,
        update_lock=update_lock,
        bench_results=bench_results,
        auto=auto,
    )
    choice: JsonValue = None
    if auto:
        tried, first = foreseen_choice(request, tools)
        choice, request = tried.to_json(), replace(request, auto=False)
        request = request if targets else first
    plan = plan_of(request, tools)
    recipe, rows = file.recipe, plan.rows
    found: dict[str, JsonValue] = {
        "name": recipe.name,
        "version": recipe.version,
        **({"auto": choice} if auto else {}),
        "stages": [row.to_json() for row in rows],
        "serving": {},
        "plan": {},
        "platforms": {},
        "sharing": {},
        "advice": None,
        "read_bytes": 0,
        "write_bytes": 0,
        "peak_memory_bytes": 0,
        "peak_disk_bytes": 0,
    }
    if (seen := plan.seen) is None:
        return found
    sources, steps = seen[plan.steps.sources], plan.steps
    named = {one.of.target.name: one for one in steps.targets}
    limit = largest_file(layer_limit(recipe.image.max_layer_size))
    serving = {name: seen[one.config].to_json() for name, one in named.items()}
    todo = [row for row in rows if not row.cached]
    written = sum(row.write_bytes for row in todo)
    found |= {
        "serving": serving,
        "plan": serving,  # the same, under the name that `render` uses
        "platforms": {name: seen[one.image] for name, one in named.items()},
        "sharing": {
            name: foreseen_sharing(
                tools.merges,
                sources,
                recipe.merge,
                one.of.target.format,
                seen[one.weights],
                limit,
                by_kind=recipe.quantize.shared_layers,
            ).to_json()
            for name, one in named.items()
        },
        "advice": _advice(request, sources, tools),
        "read_bytes": sum(row.read_bytes for row in todo),
        "write_bytes": written,
        "peak_memory_bytes": peak_memory(steps, seen),
        "peak_disk_bytes": written + temporary_bytes(todo),
    }
    if measure:
        layer, timed = _measured_layer_time(sources, tools), []
        for step in steps:
            rows, seconds = seen.rows(step), None
            if any(not row.cached for row in rows):
                with suppress(InputRefused):  # the dimensions are not known
                    seconds = step.seconds(layer, seen)
            known = None if seconds is None else round(seconds, 1)
            timed += [{**row.to_json(), "seconds": None if row.cached else known} for row in rows]
        found |= {"stages": timed, "layer_time": layer.to_json()}
    return found


def _earlier(steps: BuildSteps) -> Mapping[tuple[str, str], Mapping[str, JsonValue]]:
    """Return what the results of the last build depended on, by step and target."""
    found: dict[tuple[str, str], Mapping[str, JsonValue]] = {}
    for target in steps.targets:
        with suppress(OSError, ValueError):
            inputs = read_build(target.of.folder).inputs
            for step in (*steps.shared, *target.steps):
                if step.name in inputs:
                    found[step.name, step.target] = inputs[step.name]
    return found


def _advice(request: BuildRequest, sources: Sources, tools: Tools) -> Mapping[str, JsonValue]:
    """Return whether to merge, from the recipe, the merge's measurement and earlier builds."""
    recipe = request.file.recipe
    since, seen = (datetime.now(UTC) - timedelta(days=7)).isoformat(), set()
    for path in (request.dist / recipe.name).glob("*/*/build.json"):
        with suppress(OSError, ValueError):
            record = read_build(path.parent)
            if record.created >= since:
                seen.add(tuple(adapter.digest for adapter in record.adapters))
    found = find(sources, recipe.merge, tools.store, files=False)
    return advise(
        adapters=len(sources.adapters),
        packed=any(target.format.packed for target in request.targets),
        changes=len(seen),
        conflicts=found.details.get("conflicts") or () if found and sources.adapters else (),
    )


class Conflict(TypedDict):
    """What the merge measured of two adapters."""

    adapters: Sequence[str]
    cosine: float


_OFTEN = 3
"""Different adapters under one name within a week: it is still being trained."""
_OPPOSED = -0.05
"""Cosine of two adapters' changes below which each undoes a part of the other."""


def advise(
    *, adapters: int, packed: bool, changes: int, conflicts: Sequence[Conflict]
) -> Mapping[str, JsonValue]:
    """Return `merge` (true, false, or null without adapters) and `why`, sentences for people.

    `adapters` of the recipe; `packed`: a target is quantized; `changes`: different adapters built
    under the recipe's name within a week; `conflicts`: the merge's own measurement, empty before it
    is done.
    """
    if not adapters:
        return {"merge": None, "why": ["there is no adapter: the base is served as it is"]}
    merged: list[str] = []
    apart = [
        f"{' and '.join(pair['adapters'])} work against each other (cosine"
        f" {pair['cosine']:.2f}): merging weakens both"
        for pair in conflicts
        if pair["cosine"] < _OPPOSED
    ]
    if changes >= _OFTEN:
        apart.append(
            f"the adapters changed {changes} times within a week: unmerged, an update moves"
            " megabytes; merged, it moves every matrix that they change"
        )
    if packed:
        merged.append("a target is quantized: quantizers take one plain checkpoint")
    if adapters == 1:
        merged.append("one adapter: once merged, it costs nothing per request")
    elif not conflicts:
        merged.append(
            f"{adapters} adapters for one model: if each has clients of its own, serve them"
            " unmerged with one base (vllm-lora) instead"
        )
    else:
        merged.append("the adapters do not work against each other, as measured")
    keep = bool(apart) and not packed
    if apart and packed:
        apart.append("they can be served unmerged beside a quantized base: the target with -lora")
    return {"merge": not keep, "why": [*apart, *merged] if keep else [*merged, *apart]}


_COUNTS = (8, 256)
"""Tokens in one pass: a step of a few answers, and texts that are read."""
_BUILDER = "merge"


def _measured_layer_time(sources: Sources, tools: Tools) -> LayerTime:
    base = sources.base.tree
    tools.runner.prepare(_BUILDER, tools.progress)
    with tools.scratch() as folder:
        job = LayerTimeJob(
            builder=_BUILDER,
            model=Input.tree(base),
            counts=_COUNTS,
            output=folder,
            memory_bytes=(4 << 30) + base.weight_bytes // 4,
            seconds=job_seconds(base.weight_bytes),
            use_gpu=True,
        )
        return LayerTime.from_json(tools.runner.run(job, tools.progress))
