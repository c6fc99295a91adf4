"""The tasks of a build with their scores and verdicts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from operator import eq

from weightsmith.evaluating.gate import NAMES, DropLimit, Verdict, judge_drop
from weightsmith.evaluating.task import Task
from weightsmith.recipe import Evaluate
from weightsmith.values import Score, Scores

_NEAR_ZERO = 0.05
"""A score up to which losing everything would be within most limits."""


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
    scores: Scores
    """Subject -> score; subjects are `base`, `adapter` (unmerged), `merged` and `image`."""
    verdicts: tuple[Verdict, ...] = ()

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
    def sameness(self) -> Mapping[str, float]:
        """Share of answers that are the reference's text to the letter, of `merged` and `image`."""
        rows = self.reference.per_item if self.reference else ()
        expected = [row.get("answer") for row in rows]
        return {
            who: sum(map(eq, expected, given)) / len(expected)
            for who in ("merged", "image")
            if who in self.scores
            and len(given := [row.get("answer") for row in self.scores[who].per_item])
            == len(expected)
            > 0
        }

    @property
    def asked_apart(self) -> str:
        """Which subjects got other tokens than the reference for the same questions; else empty.

        Counts are compared, since servers return no token ids; subjects without them are left out.
        """
        expected = _prompt_tokens(self.reference)
        for who in ("merged", "image"):
            counts = _prompt_tokens(self.scores.get(who))
            pairs = zip(expected, counts, strict=len(expected) == len(counts))
            wrong = [(a, b) for a, b in pairs if a and b and a != b]
            if wrong:
                (had, got), many = wrong[0], f"{len(wrong)} of {len(counts)} questions"
                return (
                    f"{NAMES[who]} was asked otherwise than the reference in {many}: the first"
                    f" has {had} tokens for the reference and {got} for {NAMES[who]}"
                )
        return ""

    @property
    def unproven(self) -> str:
        """Why the gate could not have failed, so that passing it shows nothing; else empty."""
        if "image" not in self.scores:
            return named(self.task, "the image was not asked")
        if apart := self.asked_apart:
            return named(self.task, apart)
        adapter, base = self.scores.get("adapter"), self.scores.get("base")
        if adapter and base and adapter.score <= base.score:
            text = f"the adapter scores {adapter.score:.3f}, no more than the base alone"
            return named(self.task, text)
        if self.reference and self.reference.score <= _NEAR_ZERO:
            return named(self.task, f"the reference scores {self.reference.score:.3f}")
        return ""


def _prompt_tokens(score: Score | None) -> list[int]:
    return [row.get("prompt_tokens") or 0 for row in score.per_item] if score else []


def judged(
    task: RecipeTask, subject: str, now: Score, against: str, before: Score, limit: DropLimit
) -> Verdict:
    """Return whether a score is within its limit of another; the reason names the task."""
    verdict = judge_drop(subject, now, against, before, limit)
    return replace(verdict, reason=named(task, verdict.reason))


def named(task: RecipeTask, text: str) -> str:
    """Return the text with the task's name before it, if it has one."""
    return f"{task.task.name}: {text}" if task.task.name else text
