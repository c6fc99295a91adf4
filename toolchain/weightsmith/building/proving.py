"""What a build proves: who answers which task, and whether the image lost too much."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from weightsmith.evaluating.gate import DropLimit, Verdict, judge_drop, too_few
from weightsmith.evaluating.results import RecipeTask
from weightsmith.evaluating.task import Answers, score_task
from weightsmith.stages import reference as references
from weightsmith.tools import Tools
from weightsmith.values import Checkpoint, Json, Score, Sources


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One task: the scores of everyone who was asked it, and the verdicts."""

    tried: RecipeTask
    scores: Mapping[str, Score]
    """`base`, `adapter` (unmerged, all of the task's), `merged`, `image`: as far as asked."""
    verdicts: tuple[Verdict, ...] = ()

    def require(self) -> None:
        """Raise CheckFailed with the first verdict that failed."""
        for verdict in self.verdicts:
            verdict.require()

    @property
    def ends(self) -> int:
        """How many answers of the reference ended by themselves."""
        reference = self.scores.get("adapter", self.scores.get("base"))
        rows = reference.per_item if reference else ()
        return sum(row.get("finish_reason") == "stop" for row in rows)


def ask_references(
    tasks: Sequence[RecipeTask],
    sources: Sources,
    checkpoint: Checkpoint,
    tools: Tools,
    note: dict[str, Json],
) -> tuple[Result, ...]:
    """Return each task with the scores of base, adapter and merged model, and the merge judged.

    A several-adapter merge that wins one task at another's cost fails here, before anything is
    quantized: each adapter's own task is held against that adapter alone.
    """
    asked = [_subjects(tried, sources, checkpoint) for tried in tasks]
    note["cached"] = all(
        tools.store.find(references.inputs(subject, tried.task).key)
        for tried, subjects in zip(tasks, asked, strict=True)
        for subject in subjects.values()
    )
    results = []
    for tried, subjects in zip(tasks, asked, strict=True):
        scores = {
            name: score_task(
                tried.task, references.answers(subject, tried.task, tools), tools.command
            )
            for name, subject in subjects.items()
        }
        verdicts: tuple[Verdict, ...] = ()
        if "merged" in scores:
            limit = replace(tried.limit, min_score=0.0)
            verdicts = (
                _judged(tried, "merged", scores["merged"], "adapter", scores["adapter"], limit),
            )
        results.append(Result(tried=tried, scores=scores, verdicts=verdicts))
    return tuple(results)


def _subjects(
    tried: RecipeTask, sources: Sources, checkpoint: Checkpoint
) -> Mapping[str, references.Subject]:
    subjects = dict(references.subjects(sources, tried.adapter))
    if checkpoint.digest != sources.base.digest:
        subjects["merged"] = references.Subject(model=checkpoint.tree)
    return subjects


def with_image(
    results: Sequence[Result], answers: Sequence[Answers], tools: Tools
) -> tuple[Result, ...]:
    """Return the tasks with the image's scores, judged against the adapter's or else the base's.

    The image against the merged model shows what quantizing and serving changed; it is
    reported, and does not decide.
    """
    done = []
    for result, answer in zip(results, answers, strict=True):
        tried, scores = result.tried, dict(result.scores)
        scores["image"] = score_task(tried.task, answer, tools.command)
        against = "adapter" if "adapter" in scores else "base"
        verdicts = [_judged(tried, "image", scores["image"], against, scores[against], tried.limit)]
        if "merged" in scores:
            beside = _judged(
                tried, "image", scores["image"], "merged", scores["merged"], tried.limit
            )
            verdicts.append(replace(beside, binding=False))
        if few := too_few(verdicts[0], tried.limit.max_drop):
            tools.progress.warn(_named(tried, few))
        done.append(replace(result, scores=scores, verdicts=(*result.verdicts, *verdicts)))
    return tuple(done)


def _judged(
    tried: RecipeTask, subject: str, now: Score, against: str, before: Score, limit: DropLimit
) -> Verdict:
    verdict = judge_drop(subject, now, against, before, limit)
    return replace(verdict, reason=_named(tried, verdict.reason))


def _named(tried: RecipeTask, text: str) -> str:
    return f"{tried.task.name}: {text}" if tried.task.name else text
