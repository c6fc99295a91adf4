"""Which answers are the reference's to the letter, and where the others part from it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile

from weightsmith.core.values import Json, JsonValue, Score, Scores


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Where an answer first differs from the reference's."""

    question: int
    """Its number, from 1."""
    token: str
    """The reference's text from there to the end of its token."""
    margin: float | None
    """Nats by which the reference preferred that token to its second choice, if known: near zero
    is a near tie, which rounding decides."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sameness:
    """How many of a subject's answers are the reference's to the letter."""

    n: int
    differences: tuple[Difference, ...]
    """One per other answer."""

    @property
    def share(self) -> float:
        """The share of equal answers, from 0 to 1."""
        return 1 - len(self.differences) / self.n

    @property
    def facts(self) -> Mapping[str, Json]:
        """The sameness as JSON, for build.json."""
        return {
            "share": round(self.share, 6),
            "same": self.n - len(self.differences),
            "n": self.n,
            "differences": [
                {"question": one.question, "token": one.token, "margin": one.margin}
                for one in self.differences
            ],
        }


def sameness(scores: Scores) -> Mapping[str, Sameness]:
    """Return the sameness of all that was made, as far as they answered all questions."""
    reference = scores.get("adapter", scores.get("base"))
    found = {who: scores[who] for who in ("merged", "dequantized", "image") if who in scores}
    return {
        who: _sameness(reference, score)
        for who, score in found.items()
        if reference and 0 < len(reference.per_item) == len(score.per_item)
    }


def _sameness(reference: Score, score: Score) -> Sameness:
    rows = zip(reference.per_item, score.per_item, strict=True)
    compared = (_difference(number, *pair) for number, pair in enumerate(rows, start=1))
    return Sameness(n=len(score.per_item), differences=tuple(d for d in compared if d))


def _difference(
    number: int, expected: Mapping[str, JsonValue], given: Mapping[str, JsonValue]
) -> Difference | None:
    """Return where two answers part; None if they are equal but for white space around them.

    Detokenizers keep or drop the space before an answer's first word.
    """
    text, other = str(expected.get("answer", "")), str(given.get("answer", ""))
    if text.strip() == other.strip():
        return None
    skipped = len(text) - len(text.lstrip())
    pairs = zip(text.lstrip(), other.lstrip(), strict=False)
    same = skipped + sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    ends = [int(end) for end in _numbers(expected.get("token_ends"))]
    margins = _numbers(expected.get("margins"))
    place = bisect_right(ends, same)
    end = ends[place] if place < len(ends) else len(text)
    margin = margins[place] if place < len(margins) else None
    return Difference(question=number, token=text[same:end], margin=margin)


def _numbers(given: Json) -> list[float]:
    """Return the numbers in a text; answers that were stored earlier have them in a list."""
    return [float(one) for one in (given.split() if isinstance(given, str) else given or ())]


def describe(who: str, same: Sameness) -> str:
    """Return one sentence about a subject's sameness."""
    equal = same.n - len(same.differences)
    text = f"{who}: {equal} of {same.n} answers are the reference's to the letter"
    margins = sorted(one.margin for one in same.differences if one.margin is not None)
    if margins:
        text += (
            f"; the others part from it at a margin of {span_text(margins[0], margins[-1])} nats"
        )
    return text


def span_text(least: float, most: float) -> str:
    """Return `0.1 to 0.44`, or one number where both are written alike."""
    low, high = f"{least:.2g}", f"{most:.2g}"
    return low if low == high else f"{low} to {high}"
