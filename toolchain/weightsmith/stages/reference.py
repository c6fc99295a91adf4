"""Checkpoint, with or without adapters -> reference answers for comparison with the image."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from weightsmith.checkpoints.tokenizer_files import TEMPLATE_FILES, TOKENIZER_FILES
from weightsmith.destinations import Documents, Inputs, InStore
from weightsmith.evaluating import asking
from weightsmith.evaluating.gate import Verdict
from weightsmith.evaluating.results import RecipeTask, Result, judged
from weightsmith.evaluating.task import Answers, Task, score_task
from weightsmith.forward.memory import Walk
from weightsmith.job_inputs import Input, Virtual
from weightsmith.jobs import AskedModel, ReferenceJob
from weightsmith.outcome import Outcome, Timer
from weightsmith.resources import builder_pins
from weightsmith.time_limits import job_seconds
from weightsmith.tools import Tools
from weightsmith.values import (
    AdapterSnapshot,
    Checkpoint,
    Computed,
    Digest,
    Json,
    Sources,
    StageInputs,
    Tree,
)

BUILDER = "merge"
RECIPE_NUMBER = 5
_ANSWERS = "answers.json"
_VOICE = frozenset((*TOKENIZER_FILES, *TEMPLATE_FILES))
"""Files that decide how a question becomes tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A model to query: a checkpoint with unmerged adapters, each with its weight."""

    model: Tree
    adapters: tuple[AdapterSnapshot, ...] = ()
    weights: tuple[float, ...] | None = None
    """Weights that replace the adapters' own."""
    speakers: tuple[AdapterSnapshot, ...] = ()
    """Adapters whose tokenizer and chat template word the questions; none: its own."""
    computed: Computed | None = None
    """What computes the model's weights, if its files have none."""

    @property
    def checkpoint(self) -> Checkpoint:
        """The model without its adapters."""
        return Checkpoint(tree=self.model, computed=self.computed)

    @property
    def factors(self) -> tuple[float, ...]:
        """One weight per adapter."""
        return self.weights or tuple(adapter.weight for adapter in self.adapters)


def subjects(sources: Sources, adapter: int | None) -> Mapping[str, Subject]:
    """Return the models that answer a task before merging: `base`, and `adapter` if there is one.

    `adapter` is the number of the adapter that the task belongs to, used at full weight; None means
    all adapters together. All are asked alike: a tokenizer or chat template that an adapter brings
    words the base's questions too.
    """
    base = sources.base.tree
    if not sources.adapters:
        return {"base": Subject(model=base)}
    used = sources.adapters if adapter is None else (sources.adapters[adapter],)
    speakers = used if any(_voice(one.snapshot.tree) - _voice(base) for one in used) else ()
    return {
        "base": Subject(model=base, speakers=speakers),
        "adapter": Subject(model=base, adapters=used, weights=None if adapter is None else (1.0,)),
    }


def _voice(tree: Tree) -> frozenset[tuple[str, Digest]]:
    return frozenset((file.path, file.digest) for file in tree.files if file.path in _VOICE)


def inputs(subject: Subject, task: Task) -> StageInputs:
    """Return everything that the reference answers depend on."""
    voices: list[Json] = [sorted(_voice(a.snapshot.tree)) for a in subject.speakers]
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
            **({"speakers": voices} if voices else {}),
        },
    )


def answers(
    asked: Mapping[str, Subject], task: Task, to: Documents, tools: Tools
) -> Mapping[str, Answers]:
    """Return each subject's greedy answers in float32, or its most likely choices.

    One job computes all answers that are not cached; it reads each weight once for all subjects. It
    runs in the folder of the first of them, where it finds what an interrupted job left.
    """
    made: dict[str, Json] = {}
    while True:
        missing = {n: one for n, one in _missing(asked, task, to).items() if n not in made}
        known = _known(asked, {*missing, *made}, task, to)
        if not missing:
            return {name: task.answers_of(known.get(name) or made[name]) for name in asked}
        made |= _made(missing, known, task, to, tools)


def _made(
    missing: Mapping[str, Subject],
    known: Mapping[str, Sequence[Json]],
    task: Task,
    to: Documents,
    tools: Tools,
) -> Mapping[str, Json]:
    """Return the answers of all missing subjects; of the first, if another process has made it."""
    made: dict[str, Json] = {}
    first = next(iter(missing))

    def run(folder: Path) -> Json:
        made.update(_run(replace(_job(missing, known, task, tools), output=folder), tools))
        return made[first]

    found = to.document(partial(inputs, missing[first], task), _ANSWERS, run, resume=True)
    rest = {name: one for name, one in missing.items() if name in made and name != first}
    _keep(rest, made, task, to)
    return made or {first: found.value}


def _keep(
    missing: Mapping[str, Subject], made: Mapping[str, Json], task: Task, to: Documents
) -> None:
    for name, one in missing.items():
        to.document(partial(inputs, one, task), _ANSWERS, partial(_answered, made[name]))


def _answered(rows: Json, _: Path) -> Json:
    return rows


def walk_of(asked: Mapping[str, Subject], task: Task) -> Walk:
    """Return what a job holds in memory at its peak: the merged model answers after the others."""
    adapters = {a.snapshot.digest: a.snapshot.tree for s in asked.values() for a in s.adapters}
    return asking.walk_of(
        task,
        views=max(1, sum(name != "merged" for name in asked)),
        adapter_bytes=2 * sum(tree.weight_bytes for tree in adapters.values()),
    )


def next_job(
    tasks: Sequence[RecipeTask],
    sources: Sources,
    checkpoint: Checkpoint,
    to: Documents,
    tools: Tools,
) -> ReferenceJob | None:
    """Return the job that `reference` would run first; None if all answers are known."""
    for task in tasks:
        asked = _subjects(task, sources, checkpoint)
        if missing := _missing(asked, task.task, to):
            return _job(missing, _known(asked, missing, task.task, to), task.task, tools)
    return None


def keep_answers(
    tasks: Sequence[RecipeTask],
    sources: Sources,
    checkpoint: Checkpoint,
    to: Documents,
    made: Mapping[str, Json],
) -> None:
    """Store the answers of `next_job`, by whoever ran it."""
    for task in tasks:
        if missing := _missing(_subjects(task, sources, checkpoint), task.task, to):
            _keep({name: missing[name] for name in missing if name in made}, made, task.task, to)
            return


def _missing(asked: Mapping[str, Subject], task: Task, to: Documents) -> Mapping[str, Subject]:
    """Return the subjects whose answers are not stored."""
    return {name: one for name, one in asked.items() if not to.find(partial(inputs, one, task))}


def _known(
    asked: Mapping[str, Subject], missing: Collection[str], task: Task, to: Documents
) -> Mapping[str, Sequence[Json]]:
    """Return the answers that are stored."""
    return {
        name: _stored(to, partial(inputs, one, task))
        for name, one in asked.items()
        if name not in missing
    }


def _stored(to: Documents, key: Inputs) -> tuple[Json, ...]:
    def gone(_: Path) -> Json:
        raise AssertionError("answers vanished from the store")

    return tuple(to.document(key, _ANSWERS, gone).value)


def _run(job: ReferenceJob, tools: Tools) -> Mapping[str, Json]:
    tools.runner.prepare(BUILDER, tools.progress)
    found: Mapping[str, Json] = tools.runner.run(job, tools.progress)
    answers: Mapping[str, Json] = found["answers"]
    return answers


def _job(
    asked: Mapping[str, Subject],
    known: Mapping[str, Sequence[Json]],
    task: Task,
    tools: Tools,
) -> ReferenceJob:
    """Return the job for these subjects; whoever runs it sets its output."""
    models = {subject.model.digest: subject.checkpoint for subject in asked.values()}
    used = [a for one in asked.values() for a in (*one.adapters, *one.speakers)]
    adapters = {a.snapshot.digest: a.snapshot.tree for a in used}
    size = sum(model.tree.size for model in models.values())
    return ReferenceJob(
        builder=BUILDER,
        models=tuple(map(Input.checkpoint, models.values())),
        adapters=tuple(map(Input.tree, adapters.values())),
        asked=tuple(
            AskedModel(
                name=name,
                model=list(models).index(subject.model.digest),
                adapters=tuple(list(adapters).index(a.snapshot.digest) for a in subject.adapters),
                weights=subject.factors,
                speakers=tuple(list(adapters).index(a.snapshot.digest) for a in subject.speakers),
                **_draft(name, asked, known, task),
            )
            for name, subject in asked.items()
        ),
        questions=task.questions,
        max_tokens=task.max_tokens,
        choose=task.metric == "choice",
        batch_bytes=asking.batch_memory(
            next(iter(asked.values())).model.root, walk_of(asked, task), tools.memory.budget
        ),
        virtual=next((v for v in map(Virtual.of, models.values()) if v), None),
        output=Path(),
        memory_bytes=asking.memory_limit(size),
        seconds=job_seconds(size, tokens=len(asked) * task.most_tokens),
        use_gpu=True,
    )


def _draft(
    name: str, asked: Mapping[str, Subject], known: Mapping[str, Sequence[Json]], task: Task
) -> Mapping[str, Any]:
    """Return the subject whose answers a correct merge gives: the adapter."""
    if name != "merged" or task.metric == "choice":
        return {}
    if "adapter" in known:
        return {"draft_texts": tuple(str(row["answer"]) for row in known["adapter"])}
    return {"draft": "adapter"} if "adapter" in asked else {}


def reference(
    tasks: Sequence[RecipeTask],
    sources: Sources,
    checkpoint: Checkpoint,
    to: InStore,
    tools: Tools,
) -> Outcome[tuple[Result, ...]]:
    """Return each task with the scores of base, adapter and merged model; check the merge.

    Compares each adapter's own task with that adapter alone. So a merge of several adapters that
    improves one task at another's cost fails here, before quantization.
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
    found = answers(subjects, task.task, to, tools)
    scores = {name: score_task(task.task, found[name], tools.command) for name in subjects}
    verdicts: tuple[Verdict, ...] = ()
    if "merged" in scores:
        limit = replace(task.limit, min_score=0.0)
        verdicts = (judged(task, "merged", scores["merged"], "adapter", scores["adapter"], limit),)
    return Result(task=task, scores=scores, verdicts=verdicts)


def _subjects(task: RecipeTask, sources: Sources, checkpoint: Checkpoint) -> Mapping[str, Subject]:
    found = dict(subjects(sources, task.adapter))
    if checkpoint.digest != sources.base.digest:
        found["merged"] = Subject(model=checkpoint.tree, computed=checkpoint.computed)
    return found
