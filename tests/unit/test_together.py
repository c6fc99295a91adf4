"""Validation and reference answers in one job: what each stage takes of its time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from weightsmith.early_answers import EarlyAnswers
from weightsmith.errors import EnvironmentFailure, InputRefused
from weightsmith.job_inputs import Input
from weightsmith.jobs import AskedWalk, ProofJob, ReferenceJob, ValidateJob
from weightsmith.ports import Silent
from weightsmith.together import Together

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
    """Takes 30 seconds for answers and 10 for a validation."""

    name, networked, now = "fake", False, 0.0

    def __init__(self, *, passed: bool) -> None:
        self.passed = passed
        self.kinds: list[str] = []

    def run(self, job: Any, _: Any, **_stop: Any) -> Any:
        self.kinds.append(job.kind)
        self.now += {ProofJob.kind: 40.0, ReferenceJob.kind: 30.0}.get(job.kind, 0.0)
        return {"answers": ANSWERS, "seconds": 30.0, "validation": {"passed": self.passed}}


def both(runner: Any, kept: list[Any]) -> Together:
    return Together(runner, lambda: REFERENCE, kept.append, lambda: runner.now)


def test_each_stage_takes_the_time_of_its_own_part() -> None:
    runner, kept = Runner(passed=True), list[Any]()
    together = both(runner, kept)

    together.run(VALIDATION, Silent())
    validated = together.time()
    found = together.run(REFERENCE, Silent())

    assert (validated, together.time() - validated) == (10.0, 30.0)
    assert found == {"answers": ANSWERS}
    assert runner.kinds == ["proof"]
    assert kept == []


def test_answers_beside_a_failed_validation_are_kept() -> None:
    kept: list[Any] = []

    found = both(Runner(passed=False), kept).run(VALIDATION, Silent())

    assert found == {"passed": False}
    assert kept == [ANSWERS]


def test_another_reference_job_runs_by_itself() -> None:
    runner = Runner(passed=True)
    together = both(runner, [])

    together.run(VALIDATION, Silent())
    together.run(replace(REFERENCE, walks=(WALK, WALK)), Silent())

    assert runner.kinds == ["proof", "reference"]


@pytest.mark.parametrize("error", [EnvironmentFailure("out of memory"), KeyboardInterrupt()])
def test_answers_before_a_validation_that_does_not_end_are_kept(
    tmp_path: Path, error: BaseException
) -> None:
    class Ended(Runner):
        def run(self, job: Any, _: Any, **_stop: Any) -> Any:
            EarlyAnswers(job.output).keep("base", ANSWERS["base"])
            raise error

    kept: list[Any] = []
    with pytest.raises(type(error)):
        both(Ended(passed=True), kept).run(replace(VALIDATION, output=tmp_path), Silent())

    assert kept == [ANSWERS]


def test_what_a_killed_run_answered_is_stored_and_not_asked_again(tmp_path: Path) -> None:
    left = replace(REFERENCE, walks=(WALK, WALK))
    asked, kept = list[Any](), list[Any]()

    class Asked(Runner):
        def run(self, job: Any, _: Any, **_stop: Any) -> Any:
            asked.append(job)
            return super().run(job, _)

    EarlyAnswers(tmp_path).keep("base", ANSWERS["base"])
    runner = Asked(passed=True)
    together = Together(runner, lambda: left if kept else REFERENCE, kept.append, lambda: 0.0)

    together.run(replace(VALIDATION, output=tmp_path), Silent())

    assert kept == [ANSWERS]
    assert asked[0].reference == replace(left, output=tmp_path)
    assert together.run(left, Silent()) == {"answers": ANSWERS}


def test_a_validation_runs_alone_if_a_killed_run_answered_everything(tmp_path: Path) -> None:
    EarlyAnswers(tmp_path).keep("base", ANSWERS["base"])
    runner, kept = Runner(passed=True), list[Any]()
    together = Together(runner, lambda: None if kept else REFERENCE, kept.append, lambda: 0.0)

    together.run(replace(VALIDATION, output=tmp_path), Silent())

    assert runner.kinds == ["validate"]
    assert kept == [ANSWERS]


def test_answers_of_a_killed_run_are_stored_once(tmp_path: Path) -> None:
    """The folder is the validation's: what lies there later is of the run after it."""

    class Ended(Runner):
        def run(self, job: Any, _: Any, **_stop: Any) -> Any:
            raise KeyboardInterrupt

    EarlyAnswers(tmp_path).keep("base", ANSWERS["base"])
    kept: list[Any] = []
    with pytest.raises(KeyboardInterrupt):
        both(Ended(passed=True), kept).run(replace(VALIDATION, output=tmp_path), Silent())

    assert kept == [ANSWERS]


def test_an_error_before_any_answer_is_the_only_one(tmp_path: Path) -> None:
    class Ended(Runner):
        def run(self, job: Any, _: Any, **_stop: Any) -> Any:
            raise InputRefused("no base", hint="give one")

    kept: list[Any] = []
    with pytest.raises(InputRefused, match="no base"):
        both(Ended(passed=True), kept).run(replace(VALIDATION, output=tmp_path), Silent())

    assert kept == []
