"""What a gate that passed does not show."""

from __future__ import annotations

import re

import pytest
from weightsmith.core.values import Score
from weightsmith.evaluating.gate import DropLimit, inconclusive_reasons

NOTHING, ALL = Score(score=0.0, n=60, metric="m"), Score(score=1.0, n=60, metric="m")


def score(right: int, n: int = 60, tokens: int = 5) -> Score:
    """The first `right` of n questions are answered rightly."""
    rows = tuple(
        {"prompt": f"q{k}", "answer": "", "ok": k < right, "prompt_tokens": tokens}
        for k in range(n)
    )
    return Score(score=right / n, n=n, metric="contains", per_item=rows)


def doubted(max_drop: float = 0.05, **scores: Score) -> tuple[str, ...]:
    return inconclusive_reasons(scores, DropLimit(max_drop=max_drop))


def test_a_gate_that_could_have_failed_leaves_no_doubt() -> None:
    assert doubted(base=score(3), adapter=score(60), merged=score(60), image=score(60)) == ()
    assert doubted(base=score(60), image=score(60)) == ()


def test_a_base_within_the_limit_would_pass_too() -> None:
    (reason,) = doubted(base=score(58), adapter=score(60), image=score(60))

    assert reason.startswith("the base alone scores 0.967 (0.89 to 0.99, n=60) and would pass")


def test_a_gain_by_chance_is_none() -> None:
    """Five won of sixty: p = 0.06; six: p = 0.03."""
    (reason,) = doubted(base=score(25), adapter=score(30), image=score(30))

    assert "not significantly more than the base alone" in reason
    assert "p=0.062" in reason
    assert doubted(base=score(24), adapter=score(30), image=score(30)) == ()


@pytest.mark.parametrize(("right", "max_drop"), [(3, 0.04), (12, 0.2)])
def test_with_nothing_to_lose_nothing_is_shown(right: int, max_drop: float) -> None:
    reasons = doubted(max_drop, base=score(0), adapter=score(right), image=score(right))

    assert "an image without a right answer would pass" in reasons[0]


def test_a_gain_is_as_odd_as_a_loss() -> None:
    """A Gemma without a chat template: the server had asked in ChatML."""
    reasons = doubted(base=score(0), adapter=score(6), merged=score(6), image=score(50))

    (reason,) = reasons
    assert reason.startswith("the image scores 0.833 (0.72 to 0.91, n=60), significantly more than")
    assert reason.endswith("check whether it was asked the same")


@pytest.mark.parametrize(
    ("right", "n", "max_drop", "says"),
    [
        (33, 33, 0.05, "33 questions are too few to show that the drop is at most 0.05: .* 54 are"),
        (59, 60, 0.05, "60 questions do not show that the drop .* it is at most 0.071"),
        (60, 60, 0.0, "no number of questions can show that the drop is at most 0"),
    ],
)
def test_too_few_questions(right: int, n: int, max_drop: float, says: str) -> None:
    found = doubted(max_drop, base=score(0, n), adapter=score(n, n), image=score(right, n))

    (reason,) = found
    assert re.match(says, reason)


def test_before_the_image_is_asked_its_doubts_are_known_already() -> None:
    (few,) = doubted(base=score(0, 20), adapter=score(20, 20), merged=score(20, 20))

    assert few.startswith("20 questions are too few")


def test_other_tokens_than_the_references() -> None:
    apart = doubted(base=score(0), adapter=score(60), image=score(60, tokens=41))

    (reason,) = apart
    assert reason.startswith("the image was asked otherwise than the reference in 60 of 60")
    assert reason.endswith("5 tokens for the reference and 41 for the image")


def test_scores_without_questions_leave_chance() -> None:
    assert doubted(base=NOTHING, adapter=ALL, image=ALL) == (
        "there is no result per question, so chance cannot be excluded",
    )
