"""The graph of a fleet: one task for what several builds share, and one for each cell.

Tasks are told apart by what decides their results. Four kinds follow each other: the base (fetched,
with its answers to questions that several adapters share), a merge that several targets use, a
quantization that several engines load, and the cell, which is a build of one target.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from weightsmith.errors import WeightsmithError
from weightsmith.evaluating import subjects as references
from weightsmith.fleets.cells import AdapterBuild, Cell
from weightsmith.fleets.requests import BASE, CELL, MERGE, WEIGHTS, Failure
from weightsmith.planning.forecast import forecast
from weightsmith.planning.tasks import task_of
from weightsmith.recipe import Evaluate
from weightsmith.recipe_file import check_section
from weightsmith.serving.devices import CPU, is_cpu
from weightsmith.serving.targets import Target
from weightsmith.stages.resolve import known
from weightsmith.tools import Tools
from weightsmith.values import LORA, Json, key_of, plain

_OWN = 512 << 20
"""Bytes for the process that runs a build, beside its job."""
_LEAST = 2 << 30
_UNKNOWN = 4 << 30
"""Bytes of a task whose sources are not on this machine yet."""
_PER_CPU = 2_000_000_000
"""Bytes of 16-bit weights for which one more CPU is asked."""
_MOST_CPUS = 8
_STAGES: Mapping[str, tuple[str, ...]] = {
    BASE: ("resolve", "reference"),
    MERGE: ("merge", "validate", "reference"),
    WEIGHTS: ("merge", "validate", "reference", "quantize", "quality"),
}
"""Stages that are done once a task of that kind is; a cell has them all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What a task asks of the machine that runs it."""

    cpus: int
    memory_bytes: int
    disk_bytes: int
    gpus: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
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
    stages: tuple[Mapping[str, Json], ...]
    """Rows of the forecast."""
    questions: tuple[Mapping[str, Json], ...] = ()
    failure: Failure | None = None
    """Why it is certain that it would be refused."""

    @property
    def name(self) -> str:
        """Its name for people."""
        if self.kind == CELL:
            return self.cells[0].name
        what = {BASE: "base", MERGE: "merge", WEIGHTS: "weights"}[self.kind]
        if self.kind == BASE:
            return f"{what} {self.build.file.recipe.base.source}"
        target = f" {self.targets[0].format.name}" if self.kind == WEIGHTS else ""
        return f"{what} {self.build.adapter}{target}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Graph:
    """All tasks of a fleet, each after those that it waits for."""

    tasks: tuple[Task, ...]

    @property
    def cells(self) -> tuple[Task, ...]:
        """The tasks that make an image each."""
        return tuple(task for task in self.tasks if task.kind == CELL)

    @property
    def shared(self) -> tuple[Task, ...]:
        """The tasks that several cells wait for."""
        return tuple(task for task in self.tasks if task.kind != CELL)


@dataclass(slots=True)
class _Seen:
    """A shared task as far as it is known."""

    build: AdapterBuild
    kind: str
    targets: dict[str, Target] = field(default_factory=dict)
    cells: list[Cell] = field(default_factory=list)
    after: tuple[str, ...] = ()
    rows: tuple[Mapping[str, Json], ...] = ()
    questions: tuple[Mapping[str, Json], ...] = ()


def graph_of(builds: Sequence[AdapterBuild], dist: Path, tools: Tools) -> Graph:
    """Return the graph of these builds, with what the plan says of each task.

    Nothing is fetched or made. A cell that the plan refuses has its failure and no needs.
    """
    tools = replace(tools, two_at_once=lambda: False)  # as the nodes build
    forecasts = {
        cell: _forecast(build, target, dist, tools)
        for build in builds
        for cell, target in zip(build.cells, build.targets, strict=True)
    }
    shared = _shared(builds, forecasts)
    tasks = [
        *(_shared_task(key, seen, forecasts, tools) for key, seen in shared.items()),
        *(
            _cell_task(build, target, forecasts[cell], shared)
            for build in builds
            for cell, target in zip(build.cells, build.targets, strict=True)
        ),
    ]
    return Graph(tasks=tuple(tasks))


@dataclass(frozen=True, slots=True)
class _Forecast:
    rows: tuple[Mapping[str, Json], ...] = ()
    device: str = ""
    failure: Failure | None = None


def _forecast(build: AdapterBuild, target: Target, dist: Path, tools: Tools) -> _Forecast:
    try:
        found = forecast(build.file, (target,), dist, tools)
    except WeightsmithError as error:
        return _Forecast(failure=Failure.of(error))
    plan: Mapping[str, Any] = next(iter(found["serving"].values()), {})
    return _Forecast(rows=tuple(found["stages"]), device=str(plan.get("device", "")))


def _shared(
    builds: Sequence[AdapterBuild], forecasts: Mapping[Cell, _Forecast]
) -> dict[str, _Seen]:
    """Return the tasks that more than one cell waits for, by their keys."""
    asked = Counter(_questions_key(build) for build in builds)
    found: dict[str, _Seen] = {}
    for build in builds:
        for cell, target in zip(build.cells, build.targets, strict=True):
            if forecasts[cell].failure:
                continue
            after: tuple[str, ...] = ()
            for key, kind in _keys(build, target).items():
                seen = found.setdefault(key, _Seen(build=build, kind=kind, after=after))
                seen.cells.append(cell)
                seen.targets[target.name] = target
                seen.rows = seen.rows or forecasts[cell].rows
                if kind == BASE and asked[_questions_key(build)] > 1:
                    seen.questions = _with(seen.questions, build)
                after = (*after, key)
    several = {key: seen for key, seen in found.items() if len(seen.cells) > 1}
    # Weights are merged on the way: where the same cells wait for both, one task does it.
    quantized = [seen.cells for seen in several.values() if seen.kind == WEIGHTS]
    several = {k: s for k, s in several.items() if s.kind != MERGE or s.cells not in quantized}
    for seen in several.values():
        seen.after = tuple(key for key in seen.after if key in several)
    return several


def _keys(build: AdapterBuild, target: Target) -> dict[str, str]:
    """Return the keys of what a cell can share, with their kinds, in order."""
    recipe = build.file.recipe
    base = [plain(recipe.base.model_dump()), "base"]
    merged: list[Json] = [
        *base,
        [plain(one.model_dump(mode="json", exclude={"evaluate"})) for one in recipe.adapters],
        plain(recipe.merge),
        plain(recipe.validation.model_dump(mode="json")),
        plain(recipe.evaluate.model_dump(mode="json")) if recipe.evaluate else None,
    ]
    found = {_id(base): BASE}
    if target.format == LORA:
        return found
    found[_id([*merged, "merge"])] = MERGE
    if target.format.packed:
        sections = (recipe.calibration, recipe.quantize, recipe.quality)
        how = [one and plain(one.model_dump(mode="json")) for one in sections]
        found[_id([*merged, how, target.format.name, "weights"])] = WEIGHTS
    return found


def _id(value: Json) -> str:
    return key_of(value).short


def _asked(build: AdapterBuild) -> Mapping[str, Json] | None:
    """Return the recipe's `evaluate`, as JSON; None without one."""
    evaluate = build.file.recipe.evaluate
    return plain(evaluate.model_dump(mode="json", by_alias=True)) if evaluate else None


def _questions_key(build: AdapterBuild) -> str:
    return _id([plain(build.file.recipe.base.model_dump()), _asked(build)])


def _with(
    questions: tuple[Mapping[str, Json], ...], build: AdapterBuild
) -> tuple[Mapping[str, Json], ...]:
    one = _asked(build)
    return questions if one is None or one in questions else (*questions, one)


def _shared_task(key: str, seen: _Seen, forecasts: Mapping[Cell, _Forecast], tools: Tools) -> Task:
    rows = [row for row in seen.rows if row["stage"] in _STAGES[seen.kind]]
    cached = all(row["cached"] for row in rows)
    if seen.kind == BASE:
        rows = [row for row in rows if row["stage"] == "resolve" or seen.questions]
        cached = _base_is_cached(seen, tools)
    # A shared task that is not needed any more is not run again.
    needed = any(not _is_cached(forecasts[cell].rows) for cell in seen.cells)
    return Task(
        id=key,
        kind=seen.kind,
        build=seen.build,
        targets=tuple(seen.targets.values()),
        cells=tuple(seen.cells),
        after=seen.after,
        needs=_needs(rows, 0),
        cached=cached or not needed,
        stages=tuple(rows),
        questions=seen.questions,
    )


def _base_is_cached(seen: _Seen, tools: Tools) -> bool:
    """Return whether base, builders and shared answers are on this machine or in the cache."""
    sources, _ = known(seen.build.file, tools)
    if sources is None:
        return False
    base = references.subjects(replace(sources, adapters=()), None)["base"]
    tasks = (
        task_of(seen.build.file, check_section(Evaluate, one, "evaluate")).task
        for one in seen.questions
    )
    return all(tools.store.find(references.inputs(base, task).key) for task in tasks)


def _cell_task(
    build: AdapterBuild, target: Target, foreseen: _Forecast, shared: Mapping[str, _Seen]
) -> Task:
    cell = Cell(adapter=build.adapter, target=target.name)
    keys = () if foreseen.failure else _keys(build, target)
    after = tuple(key for key in keys if key in shared)
    earlier = [shared[key].kind for key in after if shared[key].kind != BASE]
    done = {stage for kind in earlier for stage in _STAGES[kind]}
    rows = [row for row in foreseen.rows if row["stage"] not in done]
    serve = build.file.recipe.serve
    gpus = 0 if is_cpu(foreseen.device or CPU) else serve.gpu_count
    return Task(
        id=_id([cell.adapter, cell.target, plain(build.data)]),
        kind=CELL,
        build=build,
        targets=(target,),
        cells=(cell,),
        after=after,
        needs=_needs(rows, gpus),
        cached=_is_cached(foreseen.rows),
        stages=foreseen.rows,
        failure=foreseen.failure,
    )


def _is_cached(rows: Iterable[Mapping[str, Json]]) -> bool:
    """Return whether all that can be foreseen is done; assembling and publishing take no time."""
    rows = list(rows)
    return bool(rows) and all(row["cached"] for row in rows if row["stage"] != "publish")


def _needs(rows: Sequence[Mapping[str, Json]], gpus: int) -> Needs:
    """Return what the stages that are still to do need, one after another."""
    todo = [row for row in rows if not row["cached"]]
    peak = max((int(row["peak_memory_bytes"]) for row in todo), default=0)
    read = max((int(row["read_bytes"]) for row in rows), default=0)
    known_ = any(int(row["peak_memory_bytes"]) or int(row["read_bytes"]) for row in rows)
    written = sum(int(row["write_bytes"]) for row in todo)
    beside = max((int(row["disk_bytes"]) - int(row["write_bytes"]) for row in todo), default=0)
    return Needs(
        cpus=min(_MOST_CPUS, 1 + read // _PER_CPU),
        memory_bytes=max(_LEAST, peak + peak // 4 + _OWN) if known_ or not todo else _UNKNOWN,
        disk_bytes=written + max(0, beside),
        gpus=gpus,
    )
