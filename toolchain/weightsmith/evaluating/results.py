"""The tasks of a build with their scores and verdicts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from weightsmith.evaluating.gate import DropLimit, Verdict, judge_drop
from weightsmith.evaluating.task import Task
from weightsmith.recipe import Evaluate
from weightsmith.values import Score


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeTask:
    """A task of a build, its reference, and the allowed drop."""

    task: Task
    settings: Evaluate
    adapter: int | None = None
    """Index of the adapter whose task it is; None for all adapters together."""

    @property
    def limit(self) -> DropLimit:
        """The allowed drop of merged model and image."""
        return DropLimit(
            max_drop=self.settings.max_drop,
            min_score=self.settings.min_score,
            proven=self.settings.certainty == "proven",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A task's scores and verdicts."""

    task: RecipeTask
    scores: Mapping[str, Score]
    """Subject -> score; subjects are `base`, `adapter` (unmerged), `merged` and `image`."""
    verdicts: tuple[Verdict, ...] = ()

    def require(self) -> None:
        """Raise CheckFailed with the first verdict that failed."""
        for verdict in self.verdicts:
            verdict.require()

    @property
    def ends(self) -> int:
        """Number of the reference's answers that ended by themselves."""
        reference = self.scores.get("adapter", self.scores.get("base"))
        rows = reference.per_item if reference else ()
        return sum(row.get("finish_reason") == "stop" for row in rows)


def judged(
    task: RecipeTask, subject: str, now: Score, against: str, before: Score, limit: DropLimit
) -> Verdict:
    """Return whether a score is within its limit of another; the reason names the task."""
    verdict = judge_drop(subject, now, against, before, limit)
    return replace(verdict, reason=named(task, verdict.reason))


def named(task: RecipeTask, text: str) -> str:
    """Return the text with the task's name before it, if it has one."""
    return f"{task.task.name}: {text}" if task.task.name else text
