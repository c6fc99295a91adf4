"""Checkpoint, with or without adapters -> its answers: what the image is held against."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from weightsmith.evaluating.task import Answers, Task
from weightsmith.ports import Entry
from weightsmith.resources import builder_pins
from weightsmith.time_limits import job_seconds
from weightsmith.tools import Tools
from weightsmith.values import AdapterSnapshot, Job, Json, Sources, StageInputs, Tree

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


def answers(subject: Subject, task: Task, tools: Tools) -> Answers:
    """Return the subject's greedy answers in float32, or its likeliest choices."""
    stage = inputs(subject, task)
    entry = tools.store.find(stage.key) or tools.store.produce(
        stage.key,
        {"stage": "reference", "inputs": stage.inputs},
        lambda folder: _run(folder, subject, task, tools),
    )
    return task.answers_of(_found(entry))


def _found(entry: Entry) -> Sequence[Json]:
    return tuple(json.loads(entry.tree.path(_ANSWERS).read_text("utf-8")))


def _run(folder: Path, subject: Subject, task: Task, tools: Tools) -> Mapping[str, Json]:
    job = reference_job(
        subject.model.root,
        subject.model.size,
        [a.snapshot.tree.root for a in subject.adapters],
        subject.factors,
        task,
        folder,
    )
    tools.runner.prepare(BUILDER, tools.progress)
    result = tools.runner.run(job, tools.progress)
    text = json.dumps(result["answers"], ensure_ascii=False)
    (folder / _ANSWERS).write_text(text, "utf-8")
    return {"n": len(task.items)}


def reference_job(
    model: Path,
    size: int,
    adapters: Sequence[Path],
    weights: Sequence[float],
    task: Task,
    output: Path,
) -> Job:
    """Return the job that asks a checkpoint of `size` bytes."""
    trees = {f"adapter{number}": folder for number, folder in enumerate(adapters)}
    return Job(
        stage="reference",
        builder=BUILDER,
        inputs={"model": model, **trees},
        parameters={"weights": list(weights), **task.parameters},
        output=output,
        memory_bytes=(3 << 30) + 5 * size,
        seconds=job_seconds(size, tokens=task.most_tokens),
        use_gpu=True,
    )
