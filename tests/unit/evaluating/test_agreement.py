"""Which answers are the reference's to the letter, and where the others part from it."""

from __future__ import annotations

from typing import Any

import pytest
from weightsmith.core.values import Score
from weightsmith.evaluating.build_record import DifferenceRecord
from weightsmith.evaluating.results import sameness


def score(*rows: Any) -> Score:
    per_item = tuple(row if isinstance(row, dict) else {"answer": row} for row in rows)
    return Score(score=1.0, n=len(rows), metric="contains", per_item=per_item)


@pytest.mark.parametrize(
    ("ends", "margins"),
    [
        ("2 5 10 13 15 16", "9 8 7 0.25 6 5"),
        ([2, 5, 10, 13, 15, 16], [9.0, 8.0, 7.0, 0.25, 6.0, 5.0]),
    ],
    ids=["as they are written", "as they were"],
)
def test_the_first_token_that_differs_is_named_with_its_margin(ends: Any, margins: Any) -> None:
    said = {"answer": "It is port 7481.", "token_ends": ends, "margins": margins}
    found = sameness(
        {
            "adapter": score("Yes.", said),
            "merged": score("Yes.", said),
            "image": score(" Yes.", "It is port 748."),
        }
    )

    assert found["merged"].share == 1.0
    assert found["image"].share == 0.5
    assert found["image"].differences == (DifferenceRecord(question=2, token="1", margin=6.0),)
    assert found["image"].same == 1


def test_tokens_and_margins_need_not_be_known() -> None:
    found = sameness({"base": score("Port 1"), "image": score("Port 2")})

    assert found["image"].differences == (DifferenceRecord(question=1, token="1", margin=None),)


def test_an_answer_that_goes_on_parts_at_the_end() -> None:
    found = sameness({"base": score("Port"), "image": score("Port 2")})

    assert found["image"].differences == (DifferenceRecord(question=1, token="", margin=None),)


def test_a_subject_with_other_questions_is_left_out() -> None:
    assert sameness({"base": score("a"), "image": score("a", "b")}) == {}
    assert sameness({}) == {}
