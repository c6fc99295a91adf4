"""Rates of what is done, on plain lines."""

from __future__ import annotations

import io

import pytest
from weightsmith import progress
from weightsmith.progress import PlainProgress, describe


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


def test_a_rate_is_told_only_if_something_was_done_meanwhile() -> None:
    assert describe(60, 100, "steps", 10.0, before=60) == "60 of 100 steps"
