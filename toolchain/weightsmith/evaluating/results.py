"""What a build asks of whom, and how it was answered and judged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from weightsmith.evaluating.gate import DropLimit, Verdict, judge_drop
from weightsmith.evaluating.task import Task
from weightsmith.recipe import Evaluate
from weightsmith.values import Score


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeTask:
    """One task of a build, whose adapters it is held against, and what may be lost."""

    task: Task
    wanted: Evaluate
    adapter: int | None = None
    """Number of the one adapter whose own task it is; None for all of them together."""

    @property
    def limit(self) -> DropLimit:
        """What the merged model and the image may lose."""
        return DropLimit(
            max_drop=self.wanted.max_drop,
            min_score=self.wanted.min_score,
            proven=self.wanted.certainty == "proven",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One task: the scores of everyone who was asked it, and the verdicts."""

    task: RecipeTask
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


def judged(
    task: RecipeTask, subject: str, now: Score, against: str, before: Score, limit: DropLimit
) -> Verdict:
    """Return whether a score is within its limit of another; the reason names the task."""
    verdict = judge_drop(subject, now, against, before, limit)
    return replace(verdict, reason=named(task, verdict.reason))


def named(task: RecipeTask, text: str) -> str:
    """Return the text with the task's name before it, if it has one."""
    return f"{task.task.name}: {text}" if task.task.name else text
