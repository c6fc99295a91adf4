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
    return Together(runner, REFERENCE, kept.append, lambda: runner.now)


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


def test_answers_that_a_killed_run_left_are_not_taken_for_those_of_this_one(tmp_path: Path) -> None:
    """The validation's key, and so its folder, is the same for other questions."""

    class Ended(Runner):
        def run(self, job: Any, _: Any, **_stop: Any) -> Any:
            raise KeyboardInterrupt

    EarlyAnswers(tmp_path).keep("base", ANSWERS["base"])
    kept: list[Any] = []
    with pytest.raises(KeyboardInterrupt):
        both(Ended(passed=True), kept).run(replace(VALIDATION, output=tmp_path), Silent())

    assert kept == []


def test_an_error_before_any_answer_is_the_only_one(tmp_path: Path) -> None:
    class Ended(Runner):
        def run(self, job: Any, _: Any, **_stop: Any) -> Any:
            raise InputRefused("no base", hint="give one")

    kept: list[Any] = []
    with pytest.raises(InputRefused, match="no base"):
        both(Ended(passed=True), kept).run(replace(VALIDATION, output=tmp_path), Silent())

    assert kept == []
