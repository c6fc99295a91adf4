"""Which questions of a build's suites a replay set asks."""

from __future__ import annotations

import json
import random
from pathlib import Path

from weightsmith.core.values import Score
from weightsmith.evaluating.client import Served
from weightsmith.evaluating.items import Item, read_items
from weightsmith.evaluating.results import RecipeTask, Result
from weightsmith.evaluating.task import Task
from weightsmith.models.task import ModelTask
from weightsmith.recipe.schema import Replay, Suite
from weightsmith.steps.replays import replay_requests

from tests.fakes.drawn import draw, png


def test_suites_of_choices_and_calls_are_asked_and_those_of_vectors_not() -> None:
    tools = '[{"type": "function", "function": {"name": "now"}}]'
    suites = {
        "choice": Item(messages=_asks("Yes?"), expected=("0",), line=1, choices=("yes", "no")),
        "contains": Item(messages=_asks("The time?"), expected=("now",), line=1, tools=tools),
        "embedding": Item(messages=_asks("Time"), expected=(), line=1, plain=True),
    }
    tasks = [
        RecipeTask(task=Task(items=(item,), metric=metric), settings=Suite(data="q.jsonl"))
        for metric, item in suites.items()
    ]
    results = [Result(task=task, scores={}) for task in tasks]
    served = Served(name="bot", chat=True)
    found = replay_requests(results, Replay(), (), served, lambda _: (served, {}))

    assert [(one.suite, one.request["messages"][0]["content"]) for one in found] == [
        (0, "Yes?"), (1, "The time?"),
    ]  # fmt: skip
    assert found[1].request["tools"][0]["function"]["name"] == "now"
    assert all(one.request["temperature"] == 0 and one.request["logprobs"] for one in found)


def test_models_that_do_not_chat_are_asked_what_their_suites_ask() -> None:
    item = Item(messages=_asks("Time"), expected=("0",), line=1, parts=("noon", "night"))
    task = RecipeTask(task=Task(items=(item,), metric="rerank"), settings=Suite(data="q.jsonl"))
    told = Score(
        score=1.0, n=1, metric="rerank", per_item=({"answer": "0 1", "scores": "0.5 0.25"},)
    )
    served = Served(name="judge", chat=False)
    (found,) = replay_requests(
        [Result(task=task, scores={"adapter": told})], Replay(), (), served,
        lambda _: (served, {}), ModelTask(kind="rerank"),
    )  # fmt: skip

    assert (found.path, found.reference) == ("/v1/rerank", "0.5 0.25")
    documents = ["noon", "night"]
    assert found.request == {"model": "judge", "query": "Time", "documents": documents, "top_n": 2}


def test_questions_with_large_pictures_are_left_out(tmp_path: Path) -> None:
    """A set has a megabyte for all of its questions."""
    noise = random.Random(3).randbytes(3 * 200 * 200)
    rows = b"".join(b"\0" + noise[600 * row : 600 * row + 600] for row in range(200))
    (tmp_path / "large.png").write_bytes(png(200, 200, rows))
    draw(tmp_path / "small.png", "square", (255, 0, 0))
    lines = [
        {"prompt": f"{name}?", "image": f"{name}.png", "expected": "x"}
        for name in ("small", "large")
    ]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, lines)))
    items = read_items(tmp_path / "q.jsonl")
    task = RecipeTask(task=Task(items=items, metric="contains"), settings=Suite(data="q.jsonl"))
    served = Served(name="bot", chat=True)
    found = replay_requests(
        [Result(task=task, scores={})], Replay(), (), served, lambda _: (served, {})
    )

    (one,) = found
    parts = one.request["messages"][0]["content"]
    assert {part["type"] for part in parts} == {"image_url", "text"}


def _asks(text: str) -> tuple[dict[str, str], ...]:
    return ({"role": "user", "content": text},)
