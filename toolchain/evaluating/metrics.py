"""Judges answers and scores: pure functions of text and numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence

from toolchain.errors import CheckFailed, UsageError
from toolchain.evaluating.items import Item
from toolchain.values import Json, Score

METRICS = ("contains", "exact", "regex")
_MOST_SHOWN = 3
_SHOWN_LENGTH = 120


def judge(metric: str, expected: str | Sequence[str], answer: str) -> bool:
    """Say whether an answer is right; several expected answers are alternatives.

    contains: the expected text is somewhere in the answer, without regard to case and to how
    much white space there is. exact: the answer is the expected text, but for white space around
    it. regex: `re.search` finds the pattern in the answer.
    """
    alternatives = (expected,) if isinstance(expected, str) else expected
    match metric:
        case "contains":
            return any(_loose(text) in _loose(answer) for text in alternatives)
        case "exact":
            return any(text.strip() == answer.strip() for text in alternatives)
        case "regex":
            return any(re.search(text, answer) is not None for text in alternatives)
        case _:
            raise UsageError(f"unknown metric {metric!r}", hint=f"one of: {', '.join(METRICS)}")


def check_metric(metric: str, items: Iterable[Item]) -> None:
    """Raise UsageError before anything is asked: an unknown metric, a pattern that is none."""
    judge(metric, "x", "x")
    if metric != "regex":
        return
    for item in items:
        for pattern in item.expected:
            try:
                re.compile(pattern)
            except re.error as error:
                raise UsageError(
                    f"line {item.line}: {pattern!r} is not a regular expression: {error}",
                    hint="escape special characters with a backslash, or use metric contains",
                ) from None


def score_answers(
    answers: Sequence[str | Mapping[str, Json]], items: Sequence[Item], metric: str
) -> Score:
    """Return the score of answers in the items' order.

    An answer is a text, or a mapping with `answer` and facts to keep beside it.
    """
    if len(answers) != len(items):
        raise CheckFailed(
            f"{len(answers)} answers for {len(items)} questions",
            hint="the evaluation was cut short; run it again",
        )
    check_metric(metric, items)
    rows = tuple(_row(item, answer, metric) for item, answer in zip(items, answers, strict=True))
    right = sum(bool(row["ok"]) for row in rows)
    return Score(
        score=right / len(rows) if rows else 0.0, n=len(rows), metric=metric, per_item=rows
    )


def wilson(right: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Return the Wilson score interval of a share (95 % for the default z); (0, 1) for n = 0.

    Wilson, "Probable inference, the law of succession, and statistical inference", 1927.
    """
    if n == 0:
        return 0.0, 1.0
    share = right / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def gate(image: Score, reference: Score | None, max_drop: float, min_score: float) -> None:
    """Raise CheckFailed when the image scores too low, or too far below the reference.

    The message has both scores with their intervals, the hint up to three items that changed.
    """
    if image.score < min_score:
        raise CheckFailed(
            f"the image scores {_shown(image)}, below the lowest that passes, {min_score:.3f}",
            hint=_changed(image, reference) or _changed(image, None),
        )
    # Scores are multiples of 1/n: a drop of exactly max_drop passes, whatever floats make of it.
    if reference is not None and reference.score - image.score > max_drop + 1e-9:
        raise CheckFailed(
            f"the image scores {_shown(image)}, {reference.score - image.score:.3f} below the"
            f" reference, {_shown(reference)}; at most {max_drop:.3f} is allowed",
            hint=_changed(image, reference),
        )


def _row(item: Item, answer: str | Mapping[str, Json], metric: str) -> Mapping[str, Json]:
    facts: Mapping[str, Json] = {"answer": answer} if isinstance(answer, str) else answer
    return {
        "prompt": item.prompt,
        "expected": list(item.expected),
        **facts,
        "ok": judge(metric, item.expected, str(facts["answer"])),
    }


def _loose(text: str) -> str:
    return " ".join(text.casefold().split())


def _shown(score: Score) -> str:
    low, high = wilson(round(score.score * score.n), score.n)
    return f"{score.score:.3f} ({low:.2f} to {high:.2f}, n={score.n})"


def _changed(image: Score, reference: Score | None) -> str:
    """Return up to three items that went wrong: those that were right before, if that is known."""
    earlier = reference.per_item if reference else ()
    lines = []
    for position, now in enumerate(image.per_item):
        before = earlier[position] if position < len(earlier) else None
        if now["ok"] or (before and not before["ok"]):
            continue
        was = f", was {_short(before['answer'])}" if before else ""
        lines.append(f"{_short(now['prompt'])} now gives {_short(now['answer'])}{was}")
    return "; ".join(lines[:_MOST_SHOWN])


def _short(text: Json) -> str:
    flat = " ".join(str(text).split())
    return repr(flat if len(flat) <= _SHOWN_LENGTH else flat[: _SHOWN_LENGTH - 1] + "…")
