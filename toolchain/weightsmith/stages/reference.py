"""Checkpoint, with or without adapters -> its answers: what the image is held against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from weightsmith.destinations import Documents, InStore
from weightsmith.evaluating.gate import Verdict
from weightsmith.evaluating.results import RecipeTask, Result, judged
from weightsmith.evaluating.task import Answers, Task, score_task
from weightsmith.jobs import Input, ReferenceJob
from weightsmith.outcome import Outcome, Timer
from weightsmith.resources import builder_pins
from weightsmith.time_limits import job_seconds
from weightsmith.tools import Tools
from weightsmith.values import AdapterSnapshot, Checkpoint, Json, Sources, StageInputs, Tree

BUILDER = "merge"
RECIPE_NUMBER = 2
_ANSWERS = "answers.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """Who is asked: a checkpoint with adapters on it, unmerged, each times its weight."""

    model: Tree
    adapters: tuple[AdapterSnapshot, ...] = ()
    weights: tuple[float, ...] | None = None
    """Other weights than the adapters' own."""

    @property
    def factors(self) -> tuple[float, ...]:
        """One weight per adapter."""
        return self.weights or tuple(adapter.weight for adapter in self.adapters)


def subjects(sources: Sources, adapter: int | None) -> Mapping[str, Subject]:
    """Return who answers a task before anything is merged: `base`, and `adapter` if there is one.

    `adapter` is the number of the one whose own task it is, then at its full weight; None stands
    for all of them side by side.
    """
    base = Subject(model=sources.base.tree)
    if not sources.adapters:
        return {"base": base}
    if adapter is None:
        return {"base": base, "adapter": Subject(model=base.model, adapters=sources.adapters)}
    alone = Subject(model=base.model, adapters=(sources.adapters[adapter],), weights=(1.0,))
    return {"base": base, "adapter": alone}


def inputs(subject: Subject, task: Task) -> StageInputs:
    """Return all that the reference answers depend on."""
    return StageInputs(
        stage="reference",
        recipe_number=RECIPE_NUMBER,
        inputs={
            "base": subject.model.digest,
            "adapters": [a.snapshot.digest for a in subject.adapters],
            "weights": subject.factors,
            "questions": task.digest,
            "max_tokens": task.max_tokens,
            "builder": builder_pins(BUILDER),
        },
    )


def answers(subject: Subject, task: Task, to: Documents, tools: Tools) -> Answers:
    """Return the subject's greedy answers in float32, or its likeliest choices."""
    found = to.document(
        lambda: inputs(subject, task),
        _ANSWERS,
        lambda folder: _run(folder, subject, task, tools),
    )
    return task.answers_of(tuple(found.value))


def _run(folder: Path, subject: Subject, task: Task, tools: Tools) -> Json:
    job = ReferenceJob(
        builder=BUILDER,
        model=Input.tree(subject.model),
        adapters=tuple(Input.tree(a.snapshot.tree) for a in subject.adapters),
        weights=subject.factors,
        questions=task.questions,
        max_tokens=task.max_tokens,
        choose=task.metric == "choice",
        output=folder,
        memory_bytes=(3 << 30) + 5 * subject.model.size,
        seconds=job_seconds(subject.model.size, tokens=task.most_tokens),
        use_gpu=True,
    )
    tools.runner.prepare(BUILDER, tools.progress)
    return tools.runner.run(job, tools.progress)["answers"]


def reference(
    tasks: Sequence[RecipeTask],
    sources: Sources,
    checkpoint: Checkpoint,
    to: InStore,
    tools: Tools,
) -> Outcome[tuple[Result, ...]]:
    """Return each task with the scores of base, adapter and merged model, and the merge judged.

    A several-adapter merge that wins one task at another's cost fails here, before anything is
    quantized: each adapter's own task is compared with that adapter alone.
    """
    questions = sum(len(task.task.items) for task in tasks)
    detail = f"{questions} questions to base, adapter and merged model"
    timer = Timer("reference", detail, tools)
    asked = [_subjects(task, sources, checkpoint) for task in tasks]
    cached = all(
        to.find(partial(inputs, subject, task.task))
        for task, subjects in zip(tasks, asked, strict=True)
        for subject in subjects.values()
    )
    results = tuple(
        _result(task, subjects, to, tools) for task, subjects in zip(tasks, asked, strict=True)
    )
    return timer.done(results, cached=cached)


def _result(
    task: RecipeTask, subjects: Mapping[str, Subject], to: Documents, tools: Tools
) -> Result:
    scores = {
        name: score_task(task.task, answers(subject, task.task, to, tools), tools.command)
        for name, subject in subjects.items()
    }
    verdicts: tuple[Verdict, ...] = ()
    if "merged" in scores:
        limit = replace(task.limit, min_score=0.0)
        verdicts = (judged(task, "merged", scores["merged"], "adapter", scores["adapter"], limit),)
    return Result(task=task, scores=scores, verdicts=verdicts)


def _subjects(task: RecipeTask, sources: Sources, checkpoint: Checkpoint) -> Mapping[str, Subject]:
    found = dict(subjects(sources, task.adapter))
    if checkpoint.digest != sources.base.digest:
        found["merged"] = Subject(model=checkpoint.tree)
    return found
