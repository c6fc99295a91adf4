"""Time limits: of a block in CPU time, of a job by its size."""

from __future__ import annotations

import re
import signal
import threading

import pytest
from weightsmith.core import time_limits
from weightsmith.core.errors import UsageError
from weightsmith.core.time_limits import (
    GGUF_PER_GB,
    ROUNDING_PER_GB,
    TooLong,
    cpu_limit,
    doing,
    job_seconds,
)

HOURS = 3600


def match_for_ever() -> None:
    re.fullmatch("(a+)+$", "a" * 60 + "!")


def test_libraries_that_handle_every_exception_do_not_stop_it():
    def handle() -> None:
        try:
            match_for_ever()
        except Exception:  # noqa: BLE001 - as libraries do
            pytest.fail("it was handled")

    with pytest.raises(TooLong), cpu_limit(0.2):
        handle()


@pytest.mark.slow
def test_something_that_swallows_it_once_is_interrupted_again():
    def swallow() -> None:
        try:
            match_for_ever()
        except BaseException:  # noqa: BLE001 - as libraries do
            match_for_ever()

    with pytest.raises(TooLong), cpu_limit(0.2):
        swallow()


def test_a_block_in_time_leaves_no_trace():
    before = signal.getsignal(signal.SIGVTALRM)

    with cpu_limit(60):
        assert signal.getitimer(signal.ITIMER_VIRTUAL)[0] > 0

    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0)
    assert signal.getsignal(signal.SIGVTALRM) == before


def test_other_threads_run_without_a_limit_of_their_own():
    said = []

    def work() -> None:
        with cpu_limit(0.0):
            said.append(sum(range(1000)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()

    assert said == [499500]


def test_what_is_done_is_told_when_it_begins_and_when_it_has_ended(monkeypatch):
    told = []
    monkeypatch.setattr(time_limits, "_tell", told.append)

    with pytest.raises(ValueError, match="x"), doing("asking"), doing("rendering"):
        raise ValueError("x")

    assert told == ["asking", "rendering", "asking", ""]


@pytest.mark.parametrize(
    ("limit", "at_least"),
    [
        (job_seconds(0), 0.5 * HOURS),
        # 70 billion weights in 16 bits: each file read and written again at 50 MB/s.
        (job_seconds(141 * 10**9), 141e9 * 4 / 50e6),
        # Its GGUF, at 60 CPU seconds for a GB with a matrix, on one CPU that has other work too.
        (job_seconds(141 * 10**9, per_gb=GGUF_PER_GB), 141 * 60 * 20),
        # Formats without calibration at 14 CPU seconds for a GB, without our compiled kernels.
        (job_seconds(141 * 10**9, per_gb=ROUNDING_PER_GB), 141 * 14 * 20),
        # 100 answers of 64 tokens, each a walk through 282 GB in float32 at 2 GB/s.
        (job_seconds(141 * 10**9, tokens=6400), 6400 * 282 / 2),
    ],
    ids=["least", "slow disk", "quantizing", "rounding", "answering"],
)
def test_slow_machines_with_large_models_are_not_cut(limit, at_least):
    assert limit >= at_least


def test_the_user_sets_another_limit(monkeypatch):
    for seconds in (90, 0):
        monkeypatch.setenv("WEIGHTSMITH_JOB_SECONDS", str(seconds))
        assert job_seconds(10**12) == seconds


@pytest.mark.parametrize("text", ["soon", "-1", "1.5", "٣", "9" * 30])
def test_a_limit_that_is_no_number_is_a_usage_error(text, monkeypatch):
    monkeypatch.setenv("WEIGHTSMITH_JOB_SECONDS", text)

    with pytest.raises(UsageError, match="WEIGHTSMITH_JOB_SECONDS"):
        job_seconds(1)
