"""Checkpoint, with or without adapters -> reference answers for comparison with the image."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial, reduce
from pathlib import Path
from typing import Any

from weightsmith.core.errors import InputRefused, WeightsmithError
from weightsmith.core.jobs import ReferenceJob
from weightsmith.core.values import Checkpoint, Json, JsonValue, Sources, StageInputs, Writable
from weightsmith.evaluating.gate import Verdict
from weightsmith.evaluating.results import RecipeTask, Result, judged, require
from weightsmith.evaluating.task import Answers, Task, score_task
from weightsmith.evaluating.walks import (
    BUILDER,
    AskedSubject,
    EvaluatedModel,
    Unit,
    answer_seconds,
    asked_of,
    inputs,
    job_of,
    once,
    planned_bytes,
    steps_of,
    subjects,
    task_walk,
    walk_of,
    walks,
    with_merged,
)
from weightsmith.forward.memory import UNKNOWN, LayerTime, joint_walk
from weightsmith.models.facts import ModelFacts
from weightsmith.recipe.file import RecipeFile
from weightsmith.steps.answer_checkpoint import checkpointed_answers
from weightsmith.steps.destinations import Documents, InStore
from weightsmith.steps.joined import JoinedJob
from weightsmith.steps.stage_result import StageResult, Timer
from weightsmith.steps.step import Foreseen, ForeseenWeights, Foresight, Results, Step
from weightsmith.steps.tools import JobMemory, Tools

_ANSWERS = "answers.json"


def answers(
    asked: Mapping[str, EvaluatedModel], task: Task, to: Documents, tools: Tools
) -> Mapping[str, Answers]:
    """Return each subject's greedy answers in float32, or its most likely choices; see `_rows`."""
    unit = asked_of(asked, task)
    return _answers_of(unit, _rows([unit], to, tools))


def _answers_of(unit: Unit, rows: Mapping[str, Json]) -> Mapping[str, Answers]:
    return {one.name: one.task.answers_of(rows[one.key]) for one in unit}


def _rows(units: Sequence[Unit], to: Documents, tools: Tools) -> Mapping[str, Json]:
    """Return what each model of each unit answers, by key.

    One job computes all answers that are not stored; it reads each weight once for as many models
    as fit into memory. It runs in the folder of the first of them, where it finds what an
    interrupted job left.
    """
    made: dict[str, Json] = {}
    while missing := _missing(units, to, made):
        made |= _make_missing(missing, units, made, to, tools)
    return {one.key: made.get(one.key) or _stored(one, to) for unit in units for one in unit}


def _make_missing(
    missing: Sequence[Unit],
    units: Sequence[Unit],
    made: Mapping[str, Json],
    to: Documents,
    tools: Tools,
) -> Mapping[str, Json]:
    """Return the answers of the missing models; only the first one's, if another process made them.

    Of a job that fails or is interrupted, those that it has finished are stored.
    """
    found: dict[str, Json] = {}
    first = missing[0][0]
    rest = [one for unit in missing for one in unit if one != first]
    folders: list[Path] = []

    def run(folder: Path) -> Json:
        folders.append(folder)
        early = checkpointed_answers(folder)
        found.update({one.key: early[one.key] for one in (first, *rest) if one.key in early})
        if left := tuple(once(missing, found)):
            job = _job(left, units, {**made, **found}, to, tools)
            found.update(_run(replace(job, output=folder), tools))
        return found[first.key]

    try:
        document = to.document(_key(first), _ANSWERS, run, resume=True)
    except BaseException:
        for folder in folders:  # the first one's answers stay there
            with suppress(WeightsmithError, OSError):
                _keep(rest, checkpointed_answers(folder), to)
        raise
    _keep(rest, found, to)
    return found or {first.key: document.value}


def _keep(asked: Iterable[AskedSubject], rows: Mapping[str, Json], to: Documents) -> None:
    for one in asked:
        if one.key in rows:
            to.document(_key(one), _ANSWERS, partial(_answered, rows[one.key]))


def _answered(rows: JsonValue, _: Path) -> JsonValue:
    return rows


def next_job(
    tasks: Sequence[RecipeTask],
    sources: Sources,
    checkpoint: Checkpoint,
    to: Documents,
    tools: Tools,
) -> ReferenceJob | None:
    """Return the job that `reference` would run first; None if all answers are known."""
    units = _units(tasks, sources, checkpoint)
    missing = _missing(units, to, {})
    return _job(missing, units, {}, to, tools) if missing else None


def keep_answers(
    tasks: Sequence[RecipeTask],
    sources: Sources,
    checkpoint: Checkpoint,
    to: Documents,
    made: Mapping[str, Json],
) -> None:
    """Store the answers of `next_job`, by whoever ran it."""
    units = _units(tasks, sources, checkpoint)
    _keep((one for unit in _missing(units, to, {}) for one in unit), made, to)


def _units(
    tasks: Sequence[RecipeTask], sources: Sources, checkpoint: Checkpoint
) -> tuple[Unit, ...]:
    return tuple(asked_of(with_merged(one, sources, checkpoint), one.task) for one in tasks)


def _missing(units: Sequence[Unit], to: Documents, made: Mapping[str, Json]) -> tuple[Unit, ...]:
    """Return the models whose answers are neither made nor stored, each once."""
    left = (tuple(one for one in unit if not to.find(_key(one))) for unit in once(units, made))
    return tuple(unit for unit in left if unit)


def _key(one: AskedSubject) -> partial[StageInputs]:
    return partial(inputs, one.subject, one.task)


def _stored(one: AskedSubject, to: Documents) -> Json:
    def gone(_: Path) -> JsonValue:
        raise AssertionError("answers vanished from the store")

    return to.document(_key(one), _ANSWERS, gone).value


def _run(job: ReferenceJob, tools: Tools) -> Mapping[str, Json]:
    tools.runner.prepare(BUILDER, tools.progress)
    found = tools.runner.run(job, tools.progress)
    answers: Mapping[str, Json] = found["answers"]
    return answers


def _job(
    missing: Sequence[Unit],
    units: Sequence[Unit],
    made: Mapping[str, Json],
    to: Documents,
    tools: Tools,
) -> ReferenceJob:
    """Return the job for these models; whoever runs it sets its output."""
    keys = {one.key for unit in missing for one in unit}
    drafts = {one.draft for unit in missing for one in unit} - keys
    known = {
        one.key: made.get(one.key) or _stored(one, to)
        for unit in units
        for one in unit
        if one.key in drafts
    }
    return job_of(missing, known, tools.memory.budget)


def reference(
    tasks: Sequence[RecipeTask],
    sources: Sources,
    checkpoint: Checkpoint,
    to: InStore,
    tools: Tools,
    joined: JoinedJob | None = None,
) -> StageResult[tuple[Result, ...]]:
    """Return each task with the scores of base, adapter and merged model; check the merge.

    What a `joined` job has answered is in the store by now, and took its time elsewhere.
    Compares each adapter's own task with that adapter alone. So a merge of several adapters that
    improves one task at another's cost fails here, before quantization.
    """
    questions = sum(len(task.task.items) for task in tasks)
    detail = f"{questions} questions to base, adapter and merged model"
    timer = Timer("reference", detail, tools)
    units = _units(tasks, sources, checkpoint)
    cached = not _missing(units, to, {}) and not (joined and joined.ran)
    rows = _rows(units, to, tools)
    results = tuple(
        _result(task, _answers_of(unit, rows), tools)
        for task, unit in zip(tasks, units, strict=True)
    )
    return timer.done(results, cached=cached, elsewhere=joined.seconds if joined else 0.0)


def _result(task: RecipeTask, found: Mapping[str, Answers], tools: Tools) -> Result:
    scores = {name: score_task(task.task, rows, tools.command) for name, rows in found.items()}
    verdicts: tuple[Verdict, ...] = ()
    if "merged" in scores:
        limit = replace(task.limit, min_score=0.0)
        verdicts = (judged(task, "merged", scores["merged"], "adapter", scores["adapter"], limit),)
    return Result(task=task, scores=scores, verdicts=verdicts)


def reference_memory(
    model: ModelFacts, sources: Sources, tasks: Sequence[RecipeTask], memory: JobMemory
) -> int:
    """Return the peak of the reference answers in bytes, whichever of them are missing."""
    try:
        return planned_bytes(_asked_before_merging(sources, tasks), model.shape, memory.budget)
    except InputRefused:
        return UNKNOWN


def _asked_before_merging(sources: Sources, tasks: Sequence[RecipeTask]) -> tuple[Unit, ...]:
    """Return what base and adapters are asked; the merged model follows them."""
    return tuple(once(asked_of(subjects(sources, t.adapter), t.task) for t in tasks))


@dataclass(frozen=True, eq=False, kw_only=True)
class ReferenceStep(Step[tuple[Result, ...], None]):
    """Asks base, adapters and merged model the questions; may join the validation's job."""

    name = "reference"
    in_every_plan = True
    allows_prefetch = True
    way_out = "set evaluate.limit to ask fewer questions"

    file: RecipeFile
    sources: Step[Sources, Sources]
    checkpoint: Step[Checkpoint, ForeseenWeights]
    validation: Step[Any, None]
    """In whose process it may be asked."""
    tasks: tuple[RecipeTask, ...]
    merges: bool

    @property
    def shared_as(self) -> str:
        """Targets share what was merged, with its proof."""
        return "merge" if self.merges else ""

    @property
    def options(self) -> Writable:
        """The questions."""
        recipe = self.file.recipe
        each = (recipe.evaluate, *(adapter.evaluate for adapter in recipe.adapters))
        return [one and one.model_dump(mode="json") for one in each]

    def foresee(self, seen: Foresight) -> Foreseen[None]:
        """Return its row, if there are questions."""
        if not self.tasks:
            return Foreseen(value=None)
        sources, model = seen[self.sources], seen[self.checkpoint].model
        states = [seen.state(self, _main_inputs(sources, task)) for task in self.tasks]
        state = next((one for one in states if not one.cached), states[-1])
        memory = reference_memory(model, sources, self.tasks, seen.tools.memory)
        return Foreseen(
            value=None, rows=(self.row(state, read=sources.base.tree.size, memory=memory),)
        )

    @property
    def joins(self) -> Step[Any, None]:
        """The validation, which needs the same libraries and model."""
        return self.validation

    def join(self, have: Results, tools: Tools) -> JoinedJob | None:
        """Return the job for the validation's process; None if nothing is left to ask."""
        given = self.tasks, have[self.sources], have[self.checkpoint], InStore(tools.store)
        first = partial(next_job, *given, tools)
        return JoinedJob(first, partial(keep_answers, *given)) if first() else None

    def run(self, have: Results, tools: Tools) -> StageResult[tuple[Result, ...]]:
        """Return the tasks with the scores of base, adapters and merged model."""
        given = self.tasks, have[self.sources], have[self.checkpoint], InStore(tools.store)
        return reference(*given, tools, have.joined.get(self))

    def judge(self, have: Results) -> None:
        """Raise CheckFailed if merging lost too much, or questions cannot prove anything."""
        require(have[self], tested=False)

    def inputs(self, have: Results, _tools: Tools) -> StageInputs | None:
        """Return what the first task's answers depended on."""
        return _main_inputs(have[self.sources], self.tasks[0]) if self.tasks else None

    def seconds(self, layer: LayerTime, seen: Foresight) -> float | None:
        """Return how long base and adapters answer, and the merged model reads their answers."""
        sources, shape = seen[self.sources], seen[self.checkpoint].model.shape
        budget = seen.tools.memory.budget
        groups = walks(_asked_before_merging(sources, self.tasks), shape, budget)
        answered = sum(
            answer_seconds(
                layer,
                shape,
                reduce(joint_walk, map(walk_of, group)),
                max((unit[0].task for unit in group), key=steps_of),
                budget,
            )
            for group in groups
        )
        checked = sum(
            layer.passed(task_walk(one.task).tokens, steps_of(one.task)) for one in self.tasks
        )
        return answered + (checked if sources.adapters else 0.0)


def _main_inputs(sources: Sources, task: RecipeTask) -> StageInputs:
    """Return what the answers depend on that others are compared with."""
    asked = subjects(sources, task.adapter)
    return inputs(asked.get("adapter", asked["base"]), task.task)
