"""What the scores of a task show, and what they do not."""

from __future__ import annotations

from typing import Any

from weightsmith.evaluating.results import RecipeTask, Result
from weightsmith.evaluating.task import Task
from weightsmith.recipe import Evaluate
from weightsmith.values import Score


def score(*right: bool, tokens: int = 5) -> Score:
    rows = tuple(
        {"prompt": f"q{n}", "answer": f"{ok}", "ok": ok, "prompt_tokens": tokens}
        for n, ok in enumerate(right)
    )
    return Score(score=sum(right) / len(right), n=len(right), metric="contains", per_item=rows)


def result(**scores: Score) -> Result:
    settings = Evaluate(data="eval.jsonl", max_drop=0.05)
    return Result(task=RecipeTask(task=Task(items=()), settings=settings), scores=scores)


def test_other_tokens_than_the_references_prove_nothing() -> None:
    scores: dict[str, Any] = {"base": score(False, False), "adapter": score(True, True)}

    alike = result(**scores, merged=score(True, True), image=score(True, True))
    apart = result(**scores, merged=score(True, True), image=score(True, True, tokens=41))

    assert alike.asked_apart == ""
    assert apart.unproven == (
        "the image was asked otherwise than the reference in 2 of 2 questions: the first has 5"
        " tokens for the reference and 41 for the image"
    )
