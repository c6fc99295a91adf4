"""Which questions of a build's suites a replay set asks."""

from __future__ import annotations

from weightsmith.evaluating.client import Served
from weightsmith.evaluating.items import Item
from weightsmith.evaluating.results import RecipeTask, Result
from weightsmith.evaluating.task import Task
from weightsmith.recipe.schema import Replay, Suite
from weightsmith.steps.replays import replay_requests


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


def _asks(text: str) -> tuple[dict[str, str], ...]:
    return ({"role": "user", "content": text},)
