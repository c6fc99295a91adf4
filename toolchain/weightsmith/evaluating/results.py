"""The tasks of a build with their scores and verdicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from weightsmith.core.errors import CheckFailed
from weightsmith.core.values import Score, Scores
from weightsmith.evaluating.agreement import Sameness, sameness
from weightsmith.evaluating.gate import DropLimit, Verdict, judge_drop
from weightsmith.evaluating.inconclusive import inconclusive_reasons
from weightsmith.evaluating.task import Task
from weightsmith.recipe.schema import Evaluate

NOT_PROVEN = "not proven"
"""The verdict on an image that was published although its gates could not have failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeTask:
    """A task of a build, its reference, and the allowed drop."""

    task: Task
    settings: Evaluate
    of: int = 0
    """Number of questions in the data, if only a sample of them is asked."""
    adapter: int | None = None
    """Index of the adapter whose task it is; None for all adapters together."""

    @property
    def limit(self) -> DropLimit:
        """The allowed drop of merged model and image."""
        return DropLimit(max_drop=self.settings.max_drop, min_score=self.settings.min_score)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A task's scores and verdicts."""

    task: RecipeTask
    scores: Scores
    """Subject -> score; subjects are `base`, `adapter` (unmerged), `merged`, `image`, and, where
    no image was started, `dequantized`: its weights in transformers."""
    verdicts: tuple[Verdict, ...] = ()
    not_started: str = ""
    """What the image is for that the building machine is not or has not."""

    def require(self) -> None:
        """Raise CheckFailed with the first verdict that failed."""
        for verdict in self.verdicts:
            verdict.require()

    @property
    def reference(self) -> Score | None:
        """The score that others are compared with: the adapter's, or the base's without one."""
        return self.scores.get("adapter", self.scores.get("base"))

    @property
    def ends(self) -> int:
        """Number of the reference's answers that ended by themselves."""
        rows = self.reference.per_item if self.reference else ()
        return sum(row.get("finish_reason") == "stop" for row in rows)

    @property
    def sameness(self) -> Mapping[str, Sameness]:
        """How many answers of `merged` and `image` are the reference's to the letter."""
        return sameness(self.scores)

    @property
    def unproven(self) -> tuple[str, ...]:
        """Why passing the gate shows nothing; () if it shows that at most `max_drop` was lost."""
        missing = () if "image" in self.scores else (self._not_asked,)
        return tuple(named(self.task, text) for text in (*missing, *self.inconclusive_reasons))

    @property
    def _not_asked(self) -> str:
        why = f", since it is {self.not_started}" if self.not_started else ""
        if "dequantized" not in self.scores:
            return f"the image was not asked{why}"
        return f"the image was not asked{why}; its dequantized weights were, in transformers"

    @property
    def inconclusive_reasons(self) -> tuple[str, ...]:
        """The same for the subjects that were asked so far."""
        return inconclusive_reasons(self.scores, self.task.limit)

    def require_proof(self, *, tested: bool) -> None:
        """Raise CheckFailed if the task must be proven and what is known so far has doubts.

        `tested`: the image was to be asked by now.
        """
        if self.task.settings.require != "proven":
            return
        if reasons := self.unproven if tested else self.inconclusive_reasons:
            raise CheckFailed(
                f"not proven: {reasons[0]}",
                hint="ask more or harder questions, train the adapter further, or set"
                " evaluate.require: passed",
            )


def require(results: Sequence[Result], *, tested: bool) -> None:
    """Raise CheckFailed if a score dropped too much, or a task that must be proven is not.

    `tested`: the image was to be asked by now.
    """
    for result in results:
        result.require()
    for result in results:
        result.require_proof(tested=tested)


def main_scores(results: Sequence[Result]) -> Scores:
    """Return the scores of the first task, which stand for a build where one line must do."""
    return results[0].scores if results else {}


def unproven_of(results: Sequence[Result]) -> tuple[str, ...]:
    """Return why passing a build's gates shows nothing; () if each shows what it should."""
    if not results:
        return ("the recipe has no `evaluate`",)
    return tuple(reason for result in results for reason in result.unproven)


def verdict_of(results: Sequence[Result]) -> str:
    """Return `passed`, or `not proven` if a build's gates could not have failed."""
    return NOT_PROVEN if unproven_of(results) else "passed"


def judged(
    task: RecipeTask, subject: str, now: Score, against: str, before: Score, limit: DropLimit
) -> Verdict:
    """Return whether a score is within its limit of another; the reason names the task."""
    verdict = judge_drop(subject, now, against, before, limit)
    return replace(verdict, reason=named(task, verdict.reason))


def named(task: RecipeTask, text: str) -> str:
    """Return the text with the task's name before it, if it has one."""
    return f"{task.task.name}: {text}" if task.task.name else text
