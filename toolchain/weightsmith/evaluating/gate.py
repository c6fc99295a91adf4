"""The gates of a build: decide whether a score is good enough, with confidence intervals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from weightsmith.core.errors import CheckFailed
from weightsmith.core.values import JsonValue, Score
from weightsmith.evaluating.statistics import PairedComparison, compare, items_needed, wilson

_MOST_SHOWN = 3
_SHOWN_LENGTH = 120
_CHANCE = 0.05
_NEXT = "train the adapter further, choose a format that loses less, or allow a lower score"
NAMES = {
    "base": "the base",
    "adapter": "base + adapter",
    "merged": "the merged model",
    "dequantized": "the dequantized model in transformers",
    "image": "the image",
    "this": "the subject",
    "other": "the other run",
}
"""Subject of a comparison -> its name in sentences."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DropLimit:
    """Allowed loss of score, from 0 to 1."""

    max_drop: float
    min_score: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The result of one comparison."""

    subject: str
    against: str
    """Empty if there is nothing to compare with; then only `min_score` applies."""
    passed: bool
    reason: str
    """One sentence for users."""
    hint: str = ""
    """Up to three lost items; "" if a score has none, such as a harness's."""
    comparison: PairedComparison | None = None
    needed: int = 0
    """Number of items needed to show the requested `max_drop`; 0 if there are enough."""
    binding: bool = True
    """False if the comparison is only reported."""

    @property
    def facts(self) -> Mapping[str, JsonValue]:
        """The verdict as JSON, for build.json and `--json`."""
        facts: dict[str, JsonValue] = {
            "subject": self.subject,
            "against": self.against,
            "passed": self.passed,
            "binding": self.binding,
            "reason": self.reason,
        }
        if self.comparison is not None:
            facts |= {
                "drop": round(self.comparison.drop, 6),
                "interval": [round(end, 6) for end in self.comparison.interval],
                "lost": self.comparison.lost,
                "won": self.comparison.won,
                "n": self.comparison.n,
                "p": round(self.comparison.p, 6),
            }
        if self.needed:
            facts["items_needed"] = self.needed
        return facts

    def require(self) -> None:
        """Raise CheckFailed unless it passed."""
        if self.binding and not self.passed:
            raise CheckFailed(self.reason, hint=self.hint or _NEXT)


def judge_drop(
    subject: str, now: Score, against: str, before: Score | None, limit: DropLimit
) -> Verdict:
    """Judge a score by `min_score` and by its drop from another score.

    Scores without items, such as a harness's, are compared without an interval. A drop of exactly
    `max_drop` passes.
    """
    comparison = comparison_of(now, before)
    if now.score < limit.min_score:
        return Verdict(
            subject=subject,
            against=against if before else "",
            passed=False,
            reason=f"{NAMES[subject]} scores {shown(now)}, below the minimum score of"
            f" {limit.min_score:.3f}",
            hint=changed(now, before) or changed(now, None),
            comparison=comparison,
        )
    if before is None:
        reason = f"{NAMES[subject]} scores {shown(now)}"
        return Verdict(subject=subject, against="", passed=True, reason=reason)
    drop = before.score - now.score
    # A drop of exactly max_drop passes, despite rounding of floats.
    passed = drop <= limit.max_drop + 1e-9
    needed = items_needed(limit.max_drop) if comparison else 0
    return Verdict(
        subject=subject,
        against=against,
        passed=passed,
        reason=_reason(subject, now, against, before, limit, comparison, passed=passed),
        hint="" if passed else changed(now, before),
        comparison=comparison,
        needed=needed if comparison and needed > comparison.n else 0,
    )


def too_few(verdict: Verdict, max_drop: float) -> str:
    """Return a warning if there are too few items to show the requested `max_drop`, else ''."""
    if not verdict.needed or verdict.comparison is None:
        return ""
    return (
        f"{verdict.comparison.n} questions are too few to show that the drop is at most"
        f" {max_drop:g}: even if no answer changes, {verdict.needed} are needed"
    )


def shown(score: Score) -> str:
    """Return a score with its interval, as text."""
    if not score.n:
        return f"{score.score:.3f}"
    low, high = wilson(round(score.score * score.n), score.n)
    return f"{score.score:.3f} ({low:.2f} to {high:.2f}, n={score.n})"


def changed(now: Score, before: Score | None) -> str:
    """Describe up to three wrong items; if known, only those that were right before."""
    earlier = before.per_item if before else ()
    lines = []
    for position, row in enumerate(now.per_item):
        was_row = earlier[position] if position < len(earlier) else None
        if row["ok"] or (was_row and not was_row["ok"]):
            continue
        was = f", was {_short(was_row['answer'])}" if was_row else ""
        lines.append(f"{_short(row['prompt'])} now gives {_short(row['answer'])}{was}")
    return "; ".join(lines[:_MOST_SHOWN])


def comparison_of(now: Score, before: Score | None) -> PairedComparison | None:
    """Return the paired comparison of two scores; None if there is no result per item."""
    if before is None or not now.per_item or len(now.per_item) != len(before.per_item):
        return None
    return compare(
        [bool(row["ok"]) for row in now.per_item], [bool(row["ok"]) for row in before.per_item]
    )


def _reason(
    subject: str,
    now: Score,
    against: str,
    before: Score,
    limit: DropLimit,
    comparison: PairedComparison | None,
    *,
    passed: bool,
) -> str:
    drop = before.score - now.score
    loss = f"{drop:.3f} below" if drop > 0 else f"{-drop:.3f} above" if drop < 0 else "the same as"
    text = f"{NAMES[subject]} scores {shown(now)}, {loss} {NAMES[against]}, {shown(before)}"
    if comparison:
        low, high = comparison.interval
        text += f"; the drop is {low:.3f} to {high:.3f} with 95 % confidence"
        if drop > 0:
            chance = "may be" if comparison.p > _CHANCE else "is not"
            text += f" and {chance} chance (p={comparison.p:.2g})"
    if passed:
        return text
    return f"{text}; at most {limit.max_drop:.3f} is allowed"


def _short(text: JsonValue) -> str:
    flat = " ".join(str(text).split())
    return repr(flat if len(flat) <= _SHOWN_LENGTH else flat[: _SHOWN_LENGTH - 1] + "…")
