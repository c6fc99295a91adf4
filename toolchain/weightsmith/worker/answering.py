"""Answers of several models in one job."""

from __future__ import annotations

import gc
import importlib
from collections.abc import Mapping
from functools import partial
from typing import Any

from weightsmith.core.jobs import (
    ANSWER_JOURNAL,
    AskedModel,
    AskedTask,
    AskedWalk,
    ReferenceJob,
)
from weightsmith.core.values import JsonValue, plain
from weightsmith.steps.answer_checkpoint import AnswerCheckpoint
from weightsmith.worker.wire import Report


def reference(job: ReferenceJob, report: Report) -> Mapping[str, JsonValue]:
    """Return `answers`, by the keys of their models."""
    found = answered(job, report)
    (job.output / ANSWER_JOURNAL).unlink(missing_ok=True)
    return {"answers": rows_of(found)}


def rows_of(found: Mapping[str, JsonValue]) -> Mapping[str, JsonValue]:
    """Return the rows that a job returns of what `answered` found."""
    return {key: plain(getattr(one, "rows", one)) for key, one in found.items()}


def answered(job: ReferenceJob, report: Report) -> Mapping[str, JsonValue]:
    """Return what each model answers by key: `Answered`, or log-likelihoods where it chooses.

    What a model has finished also lies in the output at once, in case the job does not end.
    """
    walking: Any = importlib.import_module("weightsmith.forward.walk")
    module: Any = importlib.import_module("weightsmith.merging.reference")
    early = AnswerCheckpoint(job.output)
    tasks = [task for walk in job.walks for task in walk.tasks]
    total = sum(len(task.questions) * len(task.models) for task in tasks)
    count = walking.Count(total, partial(report_items, report))
    kept = module.AnswerJournal(job.output / ANSWER_JOURNAL)
    found: dict[str, JsonValue] = {}
    for walk in job.walks:
        found |= _walked(job, walk, count, kept, early)
        gc.collect()  # modules with hooks refer to each other
    return found


def _walked(
    job: ReferenceJob, walk: AskedWalk, count: Any, journal: Any, early: AnswerCheckpoint
) -> Mapping[str, JsonValue]:
    subject = partial(_subject, job)

    def finished(key: str, rows: Any) -> None:
        early.keep(key, plain(rows))

    module: Any = importlib.import_module("weightsmith.merging.reference")
    if walk.choose:
        given = {one.key: (subject(one), task.questions) for one, task in _models(walk)}
        scores: Mapping[str, JsonValue] = module.likelihoods(given, count, finished)
        return scores
    asked = {
        one.key: module.GenerationRequest(
            subject=subject(one),
            items=[question.messages for question in task.questions],
            max_tokens=task.max_tokens,
        )
        for one, task in _models(walk)
    }
    found: Mapping[str, JsonValue] = module.answered(
        asked, count, batch_bytes=walk.batch_bytes, journal=journal, finished=finished
    )
    return found


def _models(walk: AskedWalk) -> list[tuple[AskedModel, AskedTask]]:
    return [(one, task) for task in walk.tasks for one in task.models]


def _subject(job: ReferenceJob, one: AskedModel) -> Any:
    reference: Any = importlib.import_module("weightsmith.merging.reference")
    return reference.UnmergedModel(
        model=job.models[one.model].path,
        adapters=tuple(
            (job.adapters[number].path, weight)
            for number, weight in zip(one.adapters, one.weights, strict=True)
        ),
        speakers=tuple(job.adapters[number].path for number in one.speakers),
        draft=one.draft,
        draft_texts=one.draft_texts,
    )


def report_items(report: Report, done: int, total: int) -> None:
    """Report so many of all items."""
    report(done, total, "items")
