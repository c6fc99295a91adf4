"""What a job of reference answers is planned to hold, and what an interrupted one leaves."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from weightsmith.destinations import InStore
from weightsmith.drivers.store import FileStore
from weightsmith.evaluating.items import Item
from weightsmith.evaluating.task import Task
from weightsmith.jobs import ANSWER_JOURNAL, ReferenceJob
from weightsmith.ports import Silent
from weightsmith.stages.reference import Subject, answers, walk_of
from weightsmith.tools import Memory
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


class Runner:
    """Writes half of its answers down and is interrupted; goes on with what it finds."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.interrupted = False

    def prepare(self, *_: object) -> None:
        """Be ready."""

    def run(self, job: ReferenceJob, _: object) -> dict[str, Any]:
        journal = job.output / ANSWER_JOURNAL
        self.begun.append(journal.read_text() if journal.exists() else "")
        journal.write_text("half of them")
        if self.interrupted:
            raise KeyboardInterrupt
        return {"answers": {one.name: ROWS for one in job.asked}}


ROWS = [{"answer": "4", "finish_reason": "stop", "prompt_tokens": 3}]
TWO = {"base": Subject(model=Tree(root=Path("base"), files=()))}
TWO["adapter"] = Subject(model=Tree(root=Path("base"), files=()), weights=(0.5,))


def one_question() -> Task:
    item = Item(messages=({"role": "user", "content": "2 + 2?"},), expected=("4",), line=1)
    return Task(items=(item,), metric="contains", max_tokens=4)


def test_an_interrupted_job_leaves_what_the_next_one_goes_on_with(tmp_path: Path) -> None:
    runner, store = Runner(), FileStore(tmp_path)
    tools: Any = SimpleNamespace(runner=runner, progress=Silent(), memory=Memory())
    runner.interrupted = True
    with pytest.raises(KeyboardInterrupt):
        answers(TWO, one_question(), InStore(store), tools)
    runner.interrupted = False

    found = answers(TWO, one_question(), InStore(store), tools)
    again = answers(TWO, one_question(), InStore(store), tools)

    assert runner.begun == ["", "half of them"]
    assert found == again
    assert list(found) == ["base", "adapter"]
    files = [path.name for path in tmp_path.glob("results/*/data/*")]
    assert files == ["answers.json"] * 2, "a temporary file was stored"
    assert not list(tmp_path.glob("partial/*"))
