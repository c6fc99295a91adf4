"""Time limits: of a block in CPU time, of a job by its size."""

from __future__ import annotations

import re
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

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
T = TypeVar("T")


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


def in_a_thread(call: Callable[[], T]) -> T:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


@pytest.mark.parametrize("handled", [Exception, BaseException])
def test_a_limit_holds_on_other_threads_too(handled):
    """Also where what runs handles every error, once even this one."""

    def work() -> str:
        with cpu_limit(0.05):
            try:
                while True:
                    pass
            except handled:
                while True:
                    pass

    with pytest.raises(TooLong):
        in_a_thread(work)


def test_a_block_in_time_on_another_thread_leaves_no_trace():
    def work() -> int:
        with cpu_limit(60):
            return threading.active_count()

    before = threading.active_count()
    # The pool's thread, and the one that looks at its clock.
    assert in_a_thread(work) == before + 2
    assert threading.active_count() == before


def test_only_its_own_threads_time_counts():
    """Others may compute beside it for as long as they like."""
    busy, done = threading.Event(), threading.Event()

    def compute() -> None:
        busy.set()
        while not done.is_set():
            pass

    def wait() -> bool:
        began = time.process_time()
        with cpu_limit(0.1):
            while time.process_time() < began + 0.3:
                time.sleep(0.01)
        return True

    other = threading.Thread(target=compute)
    other.start()
    busy.wait()
    try:
        assert in_a_thread(wait)
    finally:
        done.set()
        other.join()


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
