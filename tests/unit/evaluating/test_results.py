"""When a task must be proven, what a build says of its tasks, and whose words are the same."""

from __future__ import annotations

from typing import Any

import pytest
from weightsmith.core.errors import CheckFailed
from weightsmith.core.values import Score
from weightsmith.evaluating.build_record import DifferenceRecord
from weightsmith.evaluating.results import (
    RecipeTask,
    Result,
    require,
    sameness,
    unproven_of,
    verdict_of,
)
from weightsmith.evaluating.task import Task
from weightsmith.recipe.schema import Suite


def score(right: int, n: int = 60) -> Score:
    rows = tuple({"prompt": f"q{k}", "answer": "", "ok": k < right} for k in range(n))
    return Score(score=right / n, n=n, metric="contains", per_item=rows)


def result(needs: str = "passed", **scores: Score) -> Result:
    settings = Suite.model_validate({"data": "eval.jsonl", "max_drop": 0.05, "require": needs})
    return Result(task=RecipeTask(task=Task(items=()), settings=settings), scores=scores)


GOOD: dict[str, Any] = {"base": score(0), "adapter": score(60), "image": score(60)}
WEAK: dict[str, Any] = {"base": score(60), "adapter": score(60)}


def test_a_build_is_as_proven_as_its_weakest_task() -> None:
    assert verdict_of((result(**GOOD),)) == "passed"
    assert verdict_of((result(**GOOD), result(**WEAK, image=score(60)))) == "not proven"
    assert verdict_of(()) == "not proven"
    assert unproven_of((result(base=score(0), adapter=score(60)),)) == ("the image was not asked",)


def test_what_must_be_proven_is_refused_as_soon_as_it_cannot_be() -> None:
    require([result("proven", **GOOD)], tested=True)
    require([result(**WEAK)], tested=True)

    with pytest.raises(CheckFailed, match="not proven: the base alone scores 1") as caught:
        require([result("proven", **WEAK)], tested=False)
    assert "evaluate.require: passed" in caught.value.hint

    with pytest.raises(CheckFailed, match="not proven: the image was not asked"):
        require([result("proven", base=score(0), adapter=score(60))], tested=True)


def test_what_the_image_may_still_show_is_not_refused_before_it_is_asked() -> None:
    """Two answers lost by the merged model are within the limit, and the image may have them."""
    asked = {"base": score(0, 100), "adapter": score(100, 100), "merged": score(98, 100)}
    require([result("proven", **asked)], tested=False)

    require([result("proven", **asked, image=score(100, 100))], tested=True)
    with pytest.raises(CheckFailed, match="95 % confidence"):
        require([result("proven", **asked, image=score(98, 100))], tested=True)


def said(*rows: Any) -> Score:
    per_item = tuple(row if isinstance(row, dict) else {"answer": row} for row in rows)
    return Score(score=1.0, n=len(rows), metric="contains", per_item=per_item)


def test_the_first_token_that_differs_is_named_with_its_margin() -> None:
    ends, margins = "2 5 10 13 15 16", "9 8 7 0.25 6 5"
    told = {"answer": "It is port 7481.", "token_ends": ends, "margins": margins}
    found = sameness(
        {
            "adapter": said("Yes.", told),
            "merged": said("Yes.", told),
            "image": said(" Yes.", "It is port 748."),
        }
    )

    assert found["merged"].share == 1.0
    assert found["image"].share == 0.5
    assert found["image"].differences == (DifferenceRecord(question=2, token="1", margin=6.0),)
    assert found["image"].same == 1


@pytest.mark.parametrize(("first", "token"), [("Port 1", "1"), ("Port", "")])
def test_tokens_and_margins_need_not_be_known(first: str, token: str) -> None:
    found = sameness({"base": said(first), "image": said("Port 2")})

    assert found["image"].differences == (DifferenceRecord(question=1, token=token, margin=None),)
    # Other questions than the reference's are not compared.
    assert sameness({"base": said("a"), "image": said("a", "b")}) == sameness({}) == {}
