"""Validation and reference answers in one job: what each stage takes of its time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from weightsmith.core.errors import EnvironmentFailure, InputRefused
from weightsmith.core.jobs import AskedWalk, Input, ReferenceJob, ValidateJob
from weightsmith.core.ports import Silent
from weightsmith.steps.answer_checkpoint import AnswerCheckpoint
from weightsmith.steps.joined import JoinedJob

ENVELOPE: dict[str, Any] = {"builder": "merge", "output": Path("out"), "seconds": 0}
MODEL = Input(path=Path("model"))
WALK = AskedWalk(tasks=(), choose=False)
REFERENCE = ReferenceJob(**ENVELOPE, models=(MODEL,), adapters=(), walks=(WALK,))
VALIDATION = ValidateJob(
    **ENVELOPE, base=MODEL, merged=MODEL, adapters=(), weights=(), chats=(), scope="all",
    mixture=None,
)  # fmt: skip
ANSWERS: dict[str, Any] = {"base": [{"answer": "42"}]}


class Runner:
    """Takes 30 seconds for answers beside a validation."""

    name, networked = "fake", False

    def __init__(self, *, passed: bool) -> None:
        self.passed = passed
        self.jobs: list[Any] = []

    @property
    def kinds(self) -> list[str]:
        return [job.kind for job in self.jobs]

    def run(self, job: Any, _: Any, **_stop: Any) -> Any:
        self.jobs.append(job)
        return {"answers": ANSWERS, "seconds": 30.0, "validation": {"passed": self.passed}}


def run(joined: JoinedJob, runner: Any, output: Path = Path("out")) -> Any:
    tools: Any = SimpleNamespace(runner=runner, progress=Silent())
    return joined.run_with(replace(VALIDATION, output=output), tools)


@pytest.mark.parametrize("passed", [True, False])
def test_answers_are_stored_whatever_the_validation_finds(passed: bool) -> None:
    runner, kept = Runner(passed=passed), list[Any]()
    joined = JoinedJob(lambda: REFERENCE, kept.append)

    assert run(joined, runner) == {"passed": passed}
    assert runner.kinds == ["proof"]
    assert kept == [ANSWERS]
    assert (joined.ran, joined.seconds) == (True, 30.0)


def test_what_a_killed_run_answered_is_stored_and_not_asked_again(tmp_path: Path) -> None:
    left, kept = replace(REFERENCE, walks=(WALK, WALK)), list[Any]()
    AnswerCheckpoint(tmp_path).keep("base", ANSWERS["base"])
    runner = Runner(passed=True)

    run(JoinedJob(lambda: left if kept else REFERENCE, kept.append), runner, tmp_path)

    assert kept == [ANSWERS, ANSWERS]
    assert runner.jobs[0].reference == replace(left, output=tmp_path)


def test_a_validation_runs_alone_if_a_killed_run_answered_everything(tmp_path: Path) -> None:
    AnswerCheckpoint(tmp_path).keep("base", ANSWERS["base"])
    runner, kept = Runner(passed=True), list[Any]()
    joined = JoinedJob(lambda: None if kept else REFERENCE, kept.append)

    run(joined, runner, tmp_path)

    assert runner.kinds == ["validate"]
    assert kept == [ANSWERS]
    assert not joined.ran


@pytest.mark.parametrize(
    ("before", "answers", "error"),
    [
        (False, True, EnvironmentFailure("out of memory")),
        (False, True, KeyboardInterrupt()),
        # What lies in the validation's folder later is of the run after it.
        (True, False, KeyboardInterrupt()),
        (False, False, InputRefused("no base", hint="give one")),
    ],
)
def test_answers_before_a_validation_that_does_not_end_are_kept_once(
    tmp_path: Path, before: bool, answers: bool, error: BaseException
) -> None:
    class Ended(Runner):
        def run(self, job: Any, _: Any, **_stop: Any) -> Any:
            if answers:
                AnswerCheckpoint(job.output).keep("base", ANSWERS["base"])
            raise error

    if before:
        AnswerCheckpoint(tmp_path).keep("base", ANSWERS["base"])
    kept: list[Any] = []
    with pytest.raises(type(error)):
        run(JoinedJob(lambda: REFERENCE, kept.append), Ended(passed=True), tmp_path)

    assert kept == ([ANSWERS] if before or answers else [])
