"""What everybody may know of a build."""

from __future__ import annotations

from weightsmith.evaluating.build_record import (
    NO_TASK,
    BuildRecord,
    SourceRecord,
    SuiteRecord,
    VerdictRecord,
)
from weightsmith.evaluating.public_record import file_of, public_record

SECRET = "line 3: /home/ana/judge.py failed: Traceback"


def test_a_reason_that_quotes_the_users_program_stays_here() -> None:
    verdict = VerdictRecord(
        subject="image",
        against="adapter",
        passed=True,
        binding=True,
        reason=f"1 of 9 questions count as wrong, the first: {SECRET}",
    )
    suite = SuiteRecord(name="all", task=NO_TASK, scores={}, verdicts=(verdict,), verdict="passed")
    build = BuildRecord(
        name="bot",
        version="1",
        target="vllm",
        created="2026-12-02",
        base=SourceRecord(source="hf://a/b", pin="c", digest="d"),
        adapters=(),
        verdicts=(verdict,),
        suites=(suite,),
    )

    told = public_record(build)

    assert SECRET not in file_of(told).decode()
    assert [one.passed for one in (*told.verdicts, *told.suites[0].verdicts)] == [True, True]
