"""What a job of reference answers is planned to hold."""

from __future__ import annotations

from weightsmith.evaluating.items import Item
from weightsmith.evaluating.task import Task
from weightsmith.stages.reference import Subject, walk_of
from weightsmith.values import Tree


def test_choices_are_planned_by_the_longest_one(tmp_path) -> None:
    """They are read one by one, so an average would not cover the longest."""
    asked = {"base": Subject(model=Tree(root=tmp_path, files=()))}

    def item(letters: int, *choices: str) -> Item:
        messages = ({"role": "user", "content": "x" * letters},)
        return Item(messages=messages, expected=(), line=1, choices=choices)

    short = [item(30, "a", "b")] * 20
    walks = [
        walk_of(asked, Task(items=tuple(items), metric="choice", max_tokens=1))
        for items in (short, [*short, item(6000, "a", "b" * 300)], [item(6000, "b" * 300)])
    ]

    assert walks[1] == walks[2]
    assert walks[1].tokens >= walks[0].tokens + (6000 + 300 - 30) // 3
    assert walks[1].rows == 1
