"""What a job of reference answers is planned to hold, and what an interrupted one leaves."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from weightsmith.core.errors import InputRefused
from weightsmith.core.jobs import ANSWER_JOURNAL, ReferenceJob
from weightsmith.core.ports import Silent
from weightsmith.core.values import Tree
from weightsmith.evaluating.items import Item
from weightsmith.evaluating.task import Task
from weightsmith.evaluating.walks import EvaluatedModel, asked_of, walk_of
from weightsmith.outside.store import FileStore
from weightsmith.stages.reference import answers
from weightsmith.steps.answer_checkpoint import AnswerCheckpoint
from weightsmith.steps.destinations import InStore
from weightsmith.steps.tools import JobMemory


def test_choices_are_planned_by_the_longest_one(tmp_path) -> None:
    """They are read one by one, so an average would not cover the longest."""
    asked = {"base": EvaluatedModel(model=Tree(root=tmp_path, files=()))}

    def item(letters: int, *choices: str) -> Item:
        messages = ({"role": "user", "content": "x" * letters},)
        return Item(messages=messages, expected=(), line=1, choices=choices)

    short = [item(30, "a", "b")] * 20
    walks = [
        walk_of(asked_of(asked, Task(items=tuple(items), metric="choice", max_tokens=1)))
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
        models = [one for walk in job.walks for task in walk.tasks for one in task.models]
        return {"answers": {one.key: ROWS for one in models}}


ROWS = [{"answer": "4", "finish_reason": "stop", "prompt_tokens": 3}]
TWO = {"base": EvaluatedModel(model=Tree(root=Path("base"), files=()))}
TWO["adapter"] = EvaluatedModel(model=Tree(root=Path("base"), files=()), weights=(0.5,))


def tools_of(runner: Runner) -> Any:
    return SimpleNamespace(runner=runner, progress=Silent(), memory=JobMemory())


def one_question() -> Task:
    item = Item(messages=({"role": "user", "content": "2 + 2?"},), expected=("4",), line=1)
    return Task(items=(item,), metric="contains", max_tokens=4)


def test_an_interrupted_job_leaves_what_the_next_one_goes_on_with(tmp_path: Path) -> None:
    runner, store = Runner(), FileStore(tmp_path)
    tools = tools_of(runner)
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


class Half(Runner):
    """Finishes the answers of some models and then ends: by itself, or killed with the build."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error: BaseException | None = error
        self.asked: list[list[str]] = []

    def run(self, job: ReferenceJob, _: object) -> dict[str, Any]:
        models = [one for walk in job.walks for task in walk.tasks for one in task.models]
        self.asked.append([one.key for one in models])
        for one in models[:-1] if self.error else models:
            AnswerCheckpoint(job.output).keep(one.key, ROWS)
        if self.error:
            raise self.error
        return {"answers": {one.key: ROWS for one in models}}


def several(count: int) -> dict[str, EvaluatedModel]:
    base = Tree(root=Path("base"), files=())
    return {str(n): EvaluatedModel(model=base, weights=(n / 10,)) for n in range(1, count + 1)}


@pytest.mark.parametrize("error", [InputRefused("no"), KeyboardInterrupt()])
def test_what_a_job_has_finished_is_not_asked_again(tmp_path: Path, error: BaseException) -> None:
    """Also of other recipes: all but the first one's, which stay in its folder."""
    runner, store = Half(error), FileStore(tmp_path)
    tools = tools_of(runner)
    five, task = several(5), one_question()
    with pytest.raises(type(error)):
        answers(five, task, InStore(store), tools)
    first, *_, last = [one.key for one in asked_of(five, task)]
    runner.error = None

    answers({"3": five["3"], "2": five["2"]}, task, InStore(store), tools)
    found = answers(five, task, InStore(store), tools)

    assert runner.asked[1:] == [[last]]
    assert runner.asked[0][0] == first
    assert list(found) == list(five)
    assert not list(tmp_path.glob("partial/*"))


def test_what_a_killed_build_has_left_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, store = Half(KeyboardInterrupt()), FileStore(tmp_path)
    tools = tools_of(runner)
    five, task = several(5), one_question()
    monkeypatch.setattr("weightsmith.stages.reference._keep", lambda *_: None)
    with pytest.raises(KeyboardInterrupt):
        answers(five, task, InStore(store), tools)
    monkeypatch.undo()
    runner.error = None

    answers(five, task, InStore(store), tools)

    assert runner.asked[1:] == [[asked_of(five, task)[-1].key]]
