"""Checkpoint, with or without adapters -> reference answers for comparison with the image."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial, reduce
from pathlib import Path
from typing import Any

from weightsmith.core.errors import InputRefused, WeightsmithError
from weightsmith.core.jobs import Input, ReferenceJob
from weightsmith.core.values import Checkpoint, JsonValue, Sources, StageInputs, Writable
from weightsmith.evaluating.pictures import Picture
from weightsmith.evaluating.results import RecipeTask, Result, require, scored
from weightsmith.evaluating.task import Answers, Task, score_task
from weightsmith.evaluating.walks import (
    BUILDER,
    AskedSubject,
    EvaluatedModel,
    Unit,
    answer_seconds,
    asked_of,
    check_fits,
    has_head,
    inputs,
    job_of,
    model_task,
    once,
    planned_bytes,
    steps_of,
    subjects,
    task_walk,
    walk_of,
    walks,
    with_merged,
    worded,
)
from weightsmith.forward.memory import UNKNOWN, LayerTime, joint_walk
from weightsmith.recipe.file import RecipeFile
from weightsmith.steps.answer_checkpoint import Answered, Rows, checkpointed_answers
from weightsmith.steps.destinations import Documents, InStore
from weightsmith.steps.joined import JoinedJob
from weightsmith.steps.stage_result import StageResult, Timer
from weightsmith.steps.step import Foreseen, ForeseenWeights, Foresight, Results, Step
from weightsmith.steps.tools import Tools

_ANSWERS = "answers.json"


def answers(
    asked: Mapping[str, EvaluatedModel], task: Task, to: Documents, tools: Tools
) -> Mapping[str, Answers]:
    """Return each subject's greedy answers in float32, or its most likely choices; see `_rows`."""
    unit = asked_of(asked, task)
    return _answers_of(unit, _rows([unit], to, tools))


def _answers_of(unit: Unit, rows: Answered) -> Mapping[str, Answers]:
    return {one.name: one.task.answers_of(rows[one.key]) for one in unit}


def _rows(units: Sequence[Unit], to: Documents, tools: Tools) -> Answered:
    """Return what each model of each unit answers, by key.

    One job computes all answers that are not stored; it reads each weight once for as many models
    as fit into memory. It runs in the folder of the first of them, where it finds what an
    interrupted job left.
    """
    made: Answered = {}
    while missing := _missing(units, to, made):
        made = {**made, **_make(missing, units, made, to, tools)}
    return {one.key: made.get(one.key) or _stored(one, to) for unit in units for one in unit}


def _make(
    missing: Sequence[Unit], units: Sequence[Unit], made: Answered, to: Documents, tools: Tools
) -> Answered:
    """Return the answers of the missing models; only the first one's, if another process made them.

    Of a job that fails or is interrupted, those that it has finished are stored.
    """
    found: dict[str, Rows] = {}
    first = missing[0][0]
    rest = [one for unit in missing for one in unit if one != first]
    folders: list[Path] = []

    def run(folder: Path) -> JsonValue:
        folders.append(folder)
        early = checkpointed_answers(folder)
        found.update({one.key: early[one.key] for one in (first, *rest) if one.key in early})
        if left := tuple(once(missing, found)):
            job = _job(left, units, {**made, **found}, to, tools)
            tools.runner.prepare(BUILDER, tools.progress)
            reply: Mapping[str, Any] = tools.runner.run(replace(job, output=folder), tools.progress)
            found.update(reply["answers"])
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


def _keep(asked: Iterable[AskedSubject], rows: Answered, to: Documents) -> None:
    for one in asked:
        if one.key in rows:
            to.document(_key(one), _ANSWERS, partial(_given, rows[one.key]))


def _given(rows: JsonValue, _: Path) -> JsonValue:
    return rows


def _missing(units: Sequence[Unit], to: Documents, made: Iterable[str] = ()) -> tuple[Unit, ...]:
    """Return the models whose answers are neither `made`, by key, nor stored, each once."""
    left = (tuple(one for one in unit if not to.find(_key(one))) for unit in once(units, made))
    return tuple(unit for unit in left if unit)


def _key(one: AskedSubject) -> partial[StageInputs]:
    return partial(inputs, one.subject, one.task)


def _stored(one: AskedSubject, to: Documents) -> Rows:
    def gone(_: Path) -> JsonValue:
        raise AssertionError("answers vanished from the store")

    found: Rows = to.document(_key(one), _ANSWERS, gone).value
    return found


def _job(
    missing: Sequence[Unit], units: Sequence[Unit], made: Answered, to: Documents, tools: Tools
) -> ReferenceJob:
    """Return the job for these models; whoever runs it sets its output."""
    keys = {one.key for unit in missing for one in unit}
    drafts = {one.draft for unit in missing for one in unit} - keys
    wanted = (one for unit in units for one in unit if one.key in drafts)
    known = {one.key: made.get(one.key) or _stored(one, to) for one in wanted}
    pictures = [one for unit in missing for one in unit[0].task.pictures]
    job = job_of(missing, known, tools.memory.budget)
    return replace(job, pictures=_folder_of(pictures, tools)) if pictures else job


def _folder_of(pictures: Sequence[Picture], tools: Tools) -> Input:
    """Return a folder with these pictures alone, each once, which is in the store."""
    files = {one.seen.file: one for one in pictures}
    key = StageInputs(stage="pictures", recipe_number=1, inputs={"files": sorted(files)})

    def copy(folder: Path) -> Mapping[str, JsonValue]:
        for name, one in files.items():
            (folder / name).write_bytes(one.read())
        return {}

    return Input.tree(InStore(tools.store).files(lambda: key, copy).tree)


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
    validation: Step[object, None]
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
        return [[suite.model_dump(mode="json") for suite in suites] for suites in each]

    def foresee(self, seen: Foresight) -> Foreseen[None]:
        """Return its row, if there are questions; refuse those that are not for the model."""
        if not self.tasks:
            return Foreseen(value=None)
        sources, model = seen[self.sources], seen[self.checkpoint].model
        for one in self.tasks:
            check_fits(one.task, sources, one.settings.data)
            if one.rule.against == "base" and not has_head(sources.base.tree, one.task.pooled):
                raise InputRefused(
                    f"{one.settings.data}: `against: base`, but the base has no head of its own",
                    hint="hold the suite against the adapter, or give it a min_score alone",
                )
        states = [seen.state(self, _main_inputs(sources, task)) for task in self.tasks]
        state = next((one for one in states if not one.cached), states[-1])
        try:  # whichever answers are missing
            asked, budget = self._asked_before_merging(sources), seen.tools.memory.budget
            memory = planned_bytes(asked, model.shape, budget)
        except InputRefused:
            memory = UNKNOWN
        row = self.row(state, read=sources.base.tree.size, memory=memory)
        return Foreseen(value=None, rows=(row,))

    def _asked_before_merging(self, sources: Sources) -> tuple[Unit, ...]:
        """Return what base and adapters are asked; the merged model follows them."""
        return tuple(
            once(
                asked_of(subjects(sources, t.adapter, t.task.pooled), worded(t.task, sources))
                for t in self.tasks
            )
        )

    @property
    def joins(self) -> Step[object, None]:
        """The validation, which needs the same libraries and model."""
        return self.validation

    def join(self, have: Results, tools: Tools) -> JoinedJob | None:
        """Return the job for the validation's process; None if nothing is left to ask."""
        units, to = self._units(have), InStore(tools.store)

        def next_job() -> ReferenceJob | None:
            missing = _missing(units, to)
            return _job(missing, units, {}, to, tools) if missing else None

        def keep(made: Answered) -> None:
            _keep((one for unit in _missing(units, to) for one in unit), made, to)

        return JoinedJob(next_job, keep) if next_job() else None

    def _units(self, have: Results) -> tuple[Unit, ...]:
        given = have[self.sources], have[self.checkpoint]
        return tuple(
            asked_of(with_merged(one, *given), worded(one.task, given[0])) for one in self.tasks
        )

    def run(self, have: Results, tools: Tools) -> StageResult[tuple[Result, ...]]:
        """Return the tasks with the scores of base, adapters and merged model.

        What a joined job has answered is in the store by now, and took its time elsewhere.
        Compares each adapter's own task with that adapter alone. So a merge of several adapters
        that improves one task at another's cost fails here, before quantization.
        """
        units, to, joined = self._units(have), InStore(tools.store), have.joined.get(self)
        count = sum(len(task.task.items) for task in self.tasks)
        detail = f"{count} questions to base, adapter and merged model"
        timer = Timer(self.name, detail, tools)
        cached = not _missing(units, to) and not (joined and joined.ran)
        rows, results = _rows(units, to, tools), []
        similarity = model_task(have[self.sources]).sentence.similarity
        for task, unit in zip(self.tasks, units, strict=True):
            answered = _answers_of(unit, rows).items()
            scores = {
                name: score_task(task.task, one, tools.command, similarity=similarity)
                for name, one in answered
            }
            results.append(Result(task=task, scores=scores))
        last = units[0][-1].name if units else ""  # base, adapter or merged
        judged = scored(results, last, [one.scores[last] for one in results])
        elsewhere = joined.seconds if joined else 0.0
        return timer.done(judged, cached=cached, elsewhere=elsewhere)

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
        groups = walks(self._asked_before_merging(sources), shape, budget)
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
    asked = subjects(sources, task.adapter, task.task.pooled)
    return inputs(asked.get("adapter") or asked["base"], worded(task.task, sources))
