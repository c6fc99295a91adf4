"""Rates of what is done, on plain lines."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
from weightsmith.building import progress
from weightsmith.building.progress import PlainProgress, StageProgress


def test_what_was_done_before_a_stage_is_shown_does_not_count_for_its_rate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It was done by an interrupted run, or ahead of the stage's turn."""
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    shown = io.StringIO()
    plain = PlainProgress(shown)
    plain.stage("quantize", "q4_k_m")
    plain.advance(60, 100, "steps")
    now += 10.0
    plain.advance(80, 100, "steps")

    plain.stage("quality", "q4_k_m")
    now += 10.0
    plain.advance(80, 100, "steps")

    assert shown.getvalue().splitlines() == [
        "quantize: q4_k_m",
        "  80 of 100 steps, 2.0/s, 0:10 left",
        "quality: q4_k_m",
        "  80 of 100 steps, 8.0/s, 0:02 left",
    ]


@pytest.fixture
def pace(monkeypatch: pytest.MonkeyPatch) -> Callable[[float, int, int], str]:
    """Return what is said of `done` of `total` steps, so many seconds after the stage's start."""
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    kept = StageProgress()

    def at(seconds: float, done: int, total: int) -> str:
        nonlocal now
        now = seconds
        return kept.describe(done, total, "steps")

    return at


def test_a_rate_is_told_only_if_something_was_done_meanwhile(
    pace: Callable[[float, int, int], str],
) -> None:
    assert pace(0.1, 60, 100) == pace(10.0, 60, 100) == "60 of 100 steps"


def test_a_program_that_starts_does_not_make_the_rest_look_long(
    pace: Callable[[float, int, int], str],
) -> None:
    """The first report came after 31 s of starting: 156 minutes were foretold of a stage of 5."""
    assert pace(31.0, 1, 300) == "1 of 300 steps"
    assert pace(33.0, 3, 300) == "3 of 300 steps, 1.0/s"
    assert pace(51.0, 21, 300) == "21 of 300 steps, 1.0/s, 4:39 left"


def test_a_slow_stage_tells_its_time_after_two_minutes(
    pace: Callable[[float, int, int], str],
) -> None:
    pace(2.0, 0, 1000)

    assert pace(102.0, 5, 1000) == "5 of 1000 steps, 20 s each"
    assert pace(122.0, 6, 1000) == "6 of 1000 steps, 20 s each, 5:31:20 left"
