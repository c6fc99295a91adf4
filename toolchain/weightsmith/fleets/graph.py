"""The graph of a fleet: the union of its cells' graphs, in which equal steps are one task.

Steps are told apart by their derivations, so that equal ones are known before anything is fetched.
What several cells wait for is a task of its own: first their base (fetched, with its answers to
questions that several adapters share), then what steps are shared as. The last task of each cell is
the build of its target.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from weightsmith.building.explain import BuildPlan, plan_of
from weightsmith.building.request import BuildRequest
from weightsmith.core.errors import WeightsmithError
from weightsmith.core.values import JsonValue, Sources, key_of, plain
from weightsmith.evaluating import walks as references
from weightsmith.evaluating.results import task_of
from weightsmith.fleets.cells import AdapterBuild, Cell
from weightsmith.fleets.requests import BASE, CELL, Failure
from weightsmith.recipe.file import check_section
from weightsmith.recipe.schema import Evaluate
from weightsmith.serving.devices import CPU, is_cpu
from weightsmith.serving.targets import Target
from weightsmith.steps.delivery import ImageOutputs
from weightsmith.steps.step import AnyStep, PlanRow
from weightsmith.steps.tools import Tools

_OWN = 512 << 20
"""Bytes for the process that runs a build, beside its job."""
_LEAST = 2 << 30
_UNKNOWN = 4 << 30
"""Bytes of a task whose sources are not on this machine yet."""
_PER_CPU = 2_000_000_000
"""Bytes of 16-bit weights for which one more CPU is asked."""
_MOST_CPUS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What a task asks of the machine that runs it."""

    cpus: int
    memory_bytes: int
    disk_bytes: int
    gpus: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetTask:
    """One piece of work for one machine."""

    id: str
    kind: str
    build: AdapterBuild
    """The builds that it is of; of a shared one, those of the first adapter that needs it."""
    targets: tuple[Target, ...]
    cells: tuple[Cell, ...]
    """Those that wait for it."""
    after: tuple[str, ...]
    """Tasks that must have ended well before."""
    needs: Needs
    cached: bool
    """Whether nothing is left to do but to publish."""
    rows: tuple[PlanRow, ...]
    """What it does, as a plan has it."""
    stages: tuple[str, ...] = ()
    """The names of the stages that it runs; () for all of a build."""
    questions: tuple[Mapping[str, JsonValue], ...] = ()
    failure: Failure | None = None
    """Why it is certain that it would be refused."""
    of_one_format: bool = False
    """Whether its result is one target's weights."""

    @property
    def name(self) -> str:
        """Its name for people."""
        if self.kind == CELL:
            return self.cells[0].name
        if self.kind == BASE:
            return f"{self.kind} {self.build.file.recipe.base.source}"
        formats = {target.format.name for target in self.targets}
        alone = f" {formats.pop()}" if len(formats) == 1 and self.of_one_format else ""
        return f"{self.kind} {self.build.adapter}{alone}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Graph:
    """All tasks of a fleet, each after those that it waits for."""

    tasks: tuple[FleetTask, ...]

    @property
    def cells(self) -> tuple[FleetTask, ...]:
        """The tasks that make an image each."""
        return tuple(task for task in self.tasks if task.kind == CELL)

    @property
    def shared(self) -> tuple[FleetTask, ...]:
        """The tasks that several cells wait for."""
        return tuple(task for task in self.tasks if task.kind != CELL)


@dataclass(slots=True)
class _Shared:
    """A task that several cells may wait for, as far as it is known."""

    build: AdapterBuild
    kind: str
    of_one_format: bool = False
    steps: tuple[AnyStep, ...] = ()
    """Those of the first cell; () for the base."""
    plan: BuildPlan | None = None
    """The first cell's."""
    targets: dict[str, Target] = field(default_factory=dict)
    cells: list[Cell] = field(default_factory=list)
    after: tuple[str, ...] = ()
    questions: tuple[Mapping[str, JsonValue], ...] = ()


def graph_of(builds: Sequence[AdapterBuild], dist: Path, tools: Tools) -> Graph:
    """Return the graph of these builds, with what the plan says of each task.

    Nothing is fetched or made. A cell that the plan refuses has its failure and no needs.
    """
    tools = replace(tools, two_at_once=lambda: False)  # as the nodes build
    plans = {
        cell: _plan(build, target, dist, tools)
        for build in builds
        for cell, target in zip(build.cells, build.targets, strict=True)
    }
    shared = _shared(builds, plans)
    tasks = [
        *(_shared_task(key, one, plans, tools) for key, one in shared.items()),
        *(
            _cell_task(build, target, plans[cell], shared)
            for build in builds
            for cell, target in zip(build.cells, build.targets, strict=True)
        ),
    ]
    return Graph(tasks=tuple(tasks))


def _plan(build: AdapterBuild, target: Target, dist: Path, tools: Tools) -> BuildPlan | Failure:
    request = BuildRequest(
        file=build.file,
        targets=(target,),
        outputs=ImageOutputs(),
        dist=dist,
        engine_answers=tools.images_in_engine,
    )
    try:
        return plan_of(request, tools)
    except WeightsmithError as error:
        return Failure.of(error)


def _shared(
    builds: Sequence[AdapterBuild], plans: Mapping[Cell, BuildPlan | Failure]
) -> dict[str, _Shared]:
    """Return the tasks that more than one cell waits for, by their keys."""
    asked = Counter(_questions_key(build) for build in builds)
    found: dict[str, _Shared] = {}
    for build in builds:
        for cell, target in zip(build.cells, build.targets, strict=True):
            plan = plans[cell]
            if isinstance(plan, Failure):
                continue
            after: tuple[str, ...] = ()
            for key, kind, steps in _shareable(build, plan):
                one = found.setdefault(
                    key, _Shared(build=build, kind=kind, steps=steps, plan=plan, after=after)
                )
                one.of_one_format = bool(steps) and steps[-1].of is not None
                one.cells.append(cell)
                one.targets[target.name] = target
                if kind == BASE and asked[_questions_key(build)] > 1:
                    one.questions = _with(one.questions, build)
                after = (*after, key)
    several = {key: one for key, one in found.items() if len(one.cells) > 1}
    for key, one in list(several.items()):
        # Where the same cells wait for two tasks, one does both.
        waits = (other for other in several.values() if key in other.after)
        later = next((other for other in waits if other.cells == one.cells), None)
        if one.kind != BASE and later and later.plan:
            both = {*one.steps, *later.steps}
            later.steps = tuple(step for step in later.plan.steps if step in both)
            del several[key]
    for one in several.values():
        one.after = tuple(key for key in one.after if key in several)
    return several


def _shareable(
    build: AdapterBuild, plan: BuildPlan
) -> Iterator[tuple[str, str, tuple[AnyStep, ...]]]:
    """Yield key, kind and steps of what a cell can share, in order."""
    yield _base_key(build), BASE, ()
    for step in plan.steps:
        if step.shared_as:
            upstream = tuple(one for one in plan.steps if one in _upstream(step))
            yield step.derivation.short, step.shared_as, upstream


def _upstream(step: AnyStep) -> set[AnyStep]:
    """Return a step and all that it needs."""
    return {step}.union(*map(_upstream, step.needs))


def _base_key(build: AdapterBuild) -> str:
    return _id([plain(build.file.recipe.base.model_dump()), BASE])


def _id(value: JsonValue) -> str:
    return key_of(value).short


def _asked(build: AdapterBuild) -> Mapping[str, JsonValue] | None:
    """Return the recipe's `evaluate`, as JSON; None without one."""
    evaluate = build.file.recipe.evaluate
    return plain(evaluate.model_dump(mode="json", by_alias=True)) if evaluate else None


def _questions_key(build: AdapterBuild) -> str:
    return _id([plain(build.file.recipe.base.model_dump()), _asked(build)])


def _with(
    questions: tuple[Mapping[str, JsonValue], ...], build: AdapterBuild
) -> tuple[Mapping[str, JsonValue], ...]:
    one = _asked(build)
    return questions if one is None or one in questions else (*questions, one)


def _shared_task(
    key: str, one: _Shared, plans: Mapping[Cell, BuildPlan | Failure], tools: Tools
) -> FleetTask:
    if one.plan is None:
        raise AssertionError("a shared task is of a cell that was planned")
    steps = one.plan.steps
    if one.kind == BASE:
        asked = (steps.sources, *((steps.expected,) if one.questions else ()))
        rows = one.plan.rows_of(asked)
        cached = one.plan.seen is not None and _is_answered(one, tools)
        stages: tuple[str, ...] = (steps.sources.name,)
    else:
        rows = one.plan.rows_of(step for step in one.steps if step is not steps.sources)
        cached = all(row.cached for row in rows)
        stages = tuple(dict.fromkeys(step.name for step in one.steps))
    # A shared task that is not needed any more is not run again.
    needed = any(not _is_cached(plans[cell]) for cell in one.cells)
    return FleetTask(
        id=key,
        kind=one.kind,
        build=one.build,
        targets=tuple(one.targets.values()),
        cells=tuple(one.cells),
        after=one.after,
        needs=_needs(rows, 0),
        cached=cached or not needed,
        rows=rows,
        stages=stages,
        questions=one.questions,
        of_one_format=one.of_one_format,
    )


def _is_answered(one: _Shared, tools: Tools) -> bool:
    """Return whether the base's shared answers are on this machine or in the cache."""
    if one.plan is None or one.plan.seen is None:
        return False
    sources: Sources = one.plan.seen[one.plan.steps.sources]
    base = references.subjects(replace(sources, adapters=()), None)["base"]
    tasks = (
        task_of(one.build.file, check_section(Evaluate, asked, "evaluate")).task
        for asked in one.questions
    )
    return all(tools.store.find(references.inputs(base, task).key) for task in tasks)


def _cell_task(
    build: AdapterBuild,
    target: Target,
    plan: BuildPlan | Failure,
    shared: Mapping[str, _Shared],
) -> FleetTask:
    cell = Cell(adapter=build.adapter, target=target.name)
    id_ = _id([cell.adapter, cell.target, plain(build.data)])
    if isinstance(plan, Failure):
        return FleetTask(
            id=id_,
            kind=CELL,
            build=build,
            targets=(target,),
            cells=(cell,),
            after=(),
            needs=_needs((), 0),
            cached=False,
            rows=(),
            failure=plan,
        )
    parts = {key: steps for key, _, steps in _shareable(build, plan) if key in shared}
    done = {step for steps in parts.values() for step in steps if step is not plan.steps.sources}
    device = plan.device(plan.steps.targets[0])
    gpus = 0 if is_cpu(device or CPU) else build.file.recipe.serve.gpu_count
    return FleetTask(
        id=id_,
        kind=CELL,
        build=build,
        targets=(target,),
        cells=(cell,),
        after=tuple(parts),
        needs=_needs(plan.rows_of(step for step in plan.steps if step not in done), gpus),
        cached=_is_cached(plan),
        rows=plan.rows,
    )


def _is_cached(plan: BuildPlan | Failure) -> bool:
    """Return whether all that can be foreseen is done; assembling and publishing take no time."""
    if isinstance(plan, Failure) or plan.seen is None:
        return False
    return all(
        row.cached for row in plan.rows_of(step for step in plan.steps if not step.publishes)
    )


def _needs(rows: Iterable[PlanRow], gpus: int) -> Needs:
    """Return what the stages that are still to do need, one after another."""
    rows = list(rows)
    todo = [row for row in rows if not row.cached]
    peak = max((row.peak_memory_bytes for row in todo), default=0)
    read = max((row.read_bytes for row in rows), default=0)
    known = any(row.peak_memory_bytes or row.read_bytes for row in rows)
    written = sum(row.write_bytes for row in todo)
    intermediate = max((row.disk_bytes - row.write_bytes for row in todo), default=0)
    return Needs(
        cpus=min(_MOST_CPUS, 1 + read // _PER_CPU),
        memory_bytes=max(_LEAST, peak + peak // 4 + _OWN) if known or not todo else _UNKNOWN,
        disk_bytes=written + max(0, intermediate),
        gpus=gpus,
    )
