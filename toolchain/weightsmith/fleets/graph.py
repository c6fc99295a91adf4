"""The graph of a fleet, and its plan: the union of its cells' graphs; equal steps are one task.

Steps are told apart by their derivations, so that equal ones are known before anything is fetched.
What several cells wait for is a task of its own: first their base (fetched, with its answers to
questions that several adapters share), then what steps are shared as. The last task of each cell is
the build of its target.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from weightsmith.building import explain
from weightsmith.building.explain import BuildPlan
from weightsmith.building.request import BuildRequest
from weightsmith.core.errors import WeightsmithError
from weightsmith.core.values import JsonValue, key_of, plain
from weightsmith.evaluating import walks as references
from weightsmith.evaluating.results import task_of
from weightsmith.fleets.cells import AdapterBuild, Cell
from weightsmith.fleets.requests import BASE, CELL, Failure
from weightsmith.recipe.file import check_section
from weightsmith.recipe.schema import Suite
from weightsmith.serving.devices import CPU, is_cpu
from weightsmith.serving.memory import human
from weightsmith.serving.targets import Target
from weightsmith.steps.outputs import ImageOutputs
from weightsmith.steps.step import AnyStep, Foresight, PlanRow
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
    plan: BuildPlan
    """The first cell's."""
    steps: tuple[AnyStep, ...]
    """Of that; () for the base."""
    of_one_format: bool = False
    targets: dict[str, Target] = field(default_factory=dict)
    cells: list[Cell] = field(default_factory=list)
    after: tuple[str, ...] = ()
    questions: tuple[Mapping[str, JsonValue], ...] = ()


def graph_of(builds: Sequence[AdapterBuild], dist: Path, tools: Tools) -> Graph:
    """Return the graph of these builds, with what the plan says of each task.

    Nothing is fetched or made. A cell that the plan refuses has its failure and no needs.
    """
    tools = replace(tools, two_at_once=lambda: False)  # as the nodes build
    planned: list[tuple[AdapterBuild, Target, Cell, BuildPlan | Failure]] = []
    for build in builds:
        for target in build.targets:
            cell = Cell(adapter=build.adapter, target=target.name)
            request = BuildRequest(
                file=build.file,
                targets=(target,),
                outputs=ImageOutputs(),
                dist=dist,
                engine_answers=tools.images_in_engine,
            )
            try:
                planned.append((build, target, cell, explain.plan_of(request, tools)))
            except WeightsmithError as error:
                planned.append((build, target, cell, Failure.of(error)))
    shared = _shared(builds, planned)
    cached = {cell for _, _, cell, plan in planned if _is_cached(plan)}
    tasks = [_shared_task(key, one, cached, tools) for key, one in shared.items()]
    tasks += [_cell_task(*one, shared) for one in planned]
    return Graph(tasks=tuple(tasks))


def _shared(
    builds: Sequence[AdapterBuild],
    planned: Iterable[tuple[AdapterBuild, Target, Cell, BuildPlan | Failure]],
) -> dict[str, _Shared]:
    """Return the tasks that more than one cell waits for, by their keys."""
    count = Counter(_questions_key(build) for build in builds)
    found: dict[str, _Shared] = {}
    for build, target, cell, plan in planned:
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
            if kind == BASE and count[_questions_key(build)] > 1:
                one.questions += tuple(s for s in _asked(build) if s not in one.questions)
            after = (*after, key)
    several = {key: one for key, one in found.items() if len(one.cells) > 1}
    for key, one in list(several.items()):
        # Where the same cells wait for two tasks, one does both.
        waits = (other for other in several.values() if key in other.after)
        later = next((other for other in waits if other.cells == one.cells), None)
        if one.kind != BASE and later:
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
    yield _id([plain(build.file.recipe.base.model_dump()), BASE]), BASE, ()
    for step in plan.steps:
        if step.shared_as:
            upstream = tuple(one for one in plan.steps if one in _upstream(step))
            yield step.derivation.short, step.shared_as, upstream


def _upstream(step: AnyStep) -> set[AnyStep]:
    return {step}.union(*map(_upstream, step.needs))


def _id(value: JsonValue) -> str:
    return key_of(value).short


def _asked(build: AdapterBuild) -> tuple[Mapping[str, JsonValue], ...]:
    """Return the recipe's suites, as JSON."""
    suites = build.file.recipe.evaluate
    return tuple(plain(one.model_dump(mode="json", by_alias=True)) for one in suites)


def _questions_key(build: AdapterBuild) -> str:
    return _id([plain(build.file.recipe.base.model_dump()), _asked(build)])


def _shared_task(key: str, one: _Shared, done: Collection[Cell], tools: Tools) -> FleetTask:
    """Return a task for its cells, of which those that are `done` do not need it any more."""
    steps = one.plan.steps
    if one.kind == BASE:
        rows = one.plan.rows_of((steps.sources, *((steps.expected,) if one.questions else ())))
        cached = one.plan.seen is not None and _is_answered(one, one.plan.seen, tools)
        stages: tuple[str, ...] = (steps.sources.name,)
    else:
        rows = one.plan.rows_of(step for step in one.steps if step is not steps.sources)
        cached = all(row.cached for row in rows)
        stages = tuple(dict.fromkeys(step.name for step in one.steps))
    return FleetTask(
        id=key,
        kind=one.kind,
        build=one.build,
        targets=tuple(one.targets.values()),
        cells=tuple(one.cells),
        after=one.after,
        needs=_needs(rows, 0),
        cached=cached or all(cell in done for cell in one.cells),
        rows=rows,
        stages=stages,
        questions=one.questions,
        of_one_format=one.of_one_format,
    )


def _is_answered(one: _Shared, seen: Foresight, tools: Tools) -> bool:
    """Return whether the base's shared answers are on this machine or in the cache."""
    sources = replace(seen[one.plan.steps.sources], adapters=())
    base = references.subjects(sources, None)["base"]
    tasks = (
        references.worded(
            task_of(one.build.file, check_section(Suite, asked, "evaluate")).task, sources
        )
        for asked in one.questions
    )
    return all(
        tools.store.find(references.inputs(base, task).key)
        for task in tasks
        if references.has_head(base.model, task.pooled)
    )


def _cell_task(
    build: AdapterBuild,
    target: Target,
    cell: Cell,
    plan: BuildPlan | Failure,
    shared: Mapping[str, _Shared],
) -> FleetTask:
    task = FleetTask(
        id=_id([cell.adapter, cell.target, plain(build.data)]),
        kind=CELL,
        build=build,
        targets=(target,),
        cells=(cell,),
        after=(),
        needs=_needs((), 0),
        cached=False,
        rows=(),
    )
    if isinstance(plan, Failure):
        return replace(task, failure=plan)
    parts = {key: steps for key, _, steps in _shareable(build, plan) if key in shared}
    done = {step for steps in parts.values() for step in steps if step is not plan.steps.sources}
    device = plan.seen[plan.steps.targets[0].config].device if plan.seen else CPU
    gpus = 0 if is_cpu(device or CPU) else build.file.recipe.serve.gpu_count
    return replace(
        task,
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


def plan_of(graph: Graph) -> dict[str, JsonValue]:
    """Return the plan of a fleet; sizes in bytes.

    `total` is over what is still to do: `cpus` and `gpus` if all cells ran at once, the memory of
    the largest task and of all at once, and the disk that all results take.
    """
    todo = [task for task in graph.tasks if not task.cached and not task.failure]
    cells = [task for task in todo if task.kind == CELL]
    return {
        "cells": [
            {
                "adapter": task.cells[0].adapter,
                "target": task.targets[0].name,
                **_facts(task),
                "stages": [
                    {"stage": row.stage, "cached": row.cached, "why": row.why} for row in task.rows
                ],
                "error": task.failure.message if task.failure else None,
            }
            for task in graph.cells
        ],
        "shared": [
            {"task": task.name, "kind": task.kind, "cells": len(task.cells), **_facts(task)}
            for task in graph.shared
        ],
        "total": {
            "cells": len(graph.cells),
            "cached": sum(task.cached for task in graph.cells),
            "refused": sum(task.failure is not None for task in graph.cells),
            "shared": len(graph.shared),
            "cpus": sum(task.needs.cpus for task in cells),
            "peak_memory_bytes": max((task.needs.memory_bytes for task in todo), default=0),
            "memory_bytes": sum(task.needs.memory_bytes for task in cells),
            "disk_bytes": sum(task.needs.disk_bytes for task in todo),
            "gpus": sum(task.needs.gpus for task in cells),
        },
    }


def _facts(task: FleetTask) -> dict[str, JsonValue]:
    needs = task.needs
    return {
        "key": task.id,
        "after": list(task.after),
        "cached": task.cached,
        "cpus": needs.cpus,
        "memory_bytes": needs.memory_bytes,
        "disk_bytes": needs.disk_bytes,
        "gpus": needs.gpus,
    }


def text_of(plan: Mapping[str, Any]) -> str:
    """Return the plan for people."""

    def state(row: Mapping[str, Any]) -> str:
        if row.get("error"):
            return f"refused: {row['error']}"
        if row["cached"]:
            return "cached"
        left = [stage["stage"] for stage in row.get("stages", ()) if not stage["cached"]]
        what = f"to do ({', '.join(left)})" if left else "to do"
        return f"{what}; {row['cpus']} CPUs, {human(row['memory_bytes'])}"

    lines = [
        f"shared  {row['task']} (for {row['cells']} cells): {state(row)}" for row in plan["shared"]
    ]
    lines += [f"cell    {row['adapter']} x {row['target']}: {state(row)}" for row in plan["cells"]]
    total = plan["total"]
    lines.append(
        f"{total['cells']} cells, {total['cached']} cached, {total['refused']} refused by the plan;"
        f" {total['shared']} shared tasks"
    )
    gpus = f", {total['gpus']} GPUs" if total["gpus"] else ""
    lines.append(
        f"at once: {total['cpus']} CPUs{gpus}, {human(total['memory_bytes'])} of memory "
        f"({human(total['peak_memory_bytes'])} for the largest task), "
        f"{human(total['disk_bytes'])} of disk"
    )
    return "\n".join(lines)
