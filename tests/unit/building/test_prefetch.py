"""Steps that run ahead of their turn: what is seen of them, and how they end."""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from weightsmith.building.prefetch import Prefetch, Shares
from weightsmith.core.errors import CheckFailed
from weightsmith.core.jobs import ExportEngineJob
from weightsmith.core.ports import Progress
from weightsmith.core.waiting import check_stopped
from weightsmith.steps.stage_result import StageResult
from weightsmith.steps.step import Results, Step
from weightsmith.steps.tools import Tools

from tests.fakes.journal import RecordingProgress
from tests.fakes.memory import memory_tools

PATIENCE = 60.0
"""Seconds that nothing here takes."""


class Blocked:
    """A runner whose jobs run until they are stopped, or let go."""

    name, networked = "blocked", False

    def __init__(self) -> None:
        self.begun, self.let_go = threading.Event(), os.eventfd(0)
        self.limits: list[int] = []
        self.stopped = False

    def run(self, job: Any, progress: Progress, *, stop: int | None = None) -> Mapping[str, Any]:
        self.limits.append(job.memory_bytes)
        self.begun.set()
        if stop is None:
            return {}
        found, *_ = select.select([stop, self.let_go], [], [], PATIENCE)
        if stop in found:
            self.stopped = True
            raise InterruptedError
        return {"by": self.name}


@pytest.fixture
def runner() -> Iterator[Blocked]:
    made = Blocked()
    yield made
    os.close(made.let_go)


@pytest.fixture
def tools(tmp_path: Path, runner: Any) -> Tools:
    return replace(memory_tools(tmp_path), runner=runner, progress=RecordingProgress())


def job(memory: int = 0) -> ExportEngineJob:
    return ExportEngineJob(builder="gguf", output=Path(), memory_bytes=memory, seconds=0)


@dataclass(frozen=True, eq=False, kw_only=True)
class Work(Step[str, None]):
    """A step that does what a test says."""

    name = "quantize"
    does: Callable[[Tools], str]

    def run(self, _have: Results, tools: Tools) -> StageResult[str]:
        return StageResult(stage=self.name, value=self.does(tools), cached=False, seconds=0.0)


def work(tools: Tools) -> str:
    """Say something, run a job, and say that it is done."""
    tools.progress.stage("quantize", "q4_k_m")
    tools.progress.advance(1, 9, "steps")
    tools.progress.advance(2, 9, "steps")
    found = tools.runner.run(job(8 << 30), tools.progress)
    tools.progress.warn("a warning")
    tools.progress.finish("quantize", 1.0, False)
    return str(found["by"])


SHARES = Shares(now=3 << 30, ahead=1 << 30)
Q4 = Work(does=work)


def start(prefetch: Prefetch, tools: Tools, *steps: Work) -> None:
    prefetch.start(steps or (Q4,), Results(), tools, SHARES)


def test_it_is_followed_from_its_turn_on(tools: Any, runner: Blocked) -> None:
    class Reader(RecordingProgress):
        def stage(self, name: str, detail: str) -> None:
            os.eventfd_write(runner.let_go, 1)  # it ends only once its beginning was shown
            super().stage(name, detail)

    seen = Reader()
    with closing(Prefetch()) as prefetch:
        start(prefetch, replace(tools, progress=seen))
        assert runner.begun.wait(PATIENCE)
        prefetch.take(Q4)

    assert seen.lines == [
        ("stage", "quantize", "q4_k_m"),
        ("advance", "2", "9", "steps"),  # where its bar stood
        ("warn", "a warning"),
        ("finish", "quantize"),
    ]


def test_its_error_waits_for_its_turn(tools: Any) -> None:
    def fails(_: Tools) -> str:
        raise CheckFailed("it is damaged", hint="make it again")

    damaged = Work(does=fails)
    with closing(Prefetch()) as prefetch:
        start(prefetch, tools, damaged)
        with pytest.raises(CheckFailed, match="it is damaged"):
            prefetch.take(damaged)

    with closing(Prefetch()) as prefetch:
        start(prefetch, tools, damaged)  # whose turn never comes


def test_nothing_of_it_outlives_the_block(tools: Any, runner: Blocked) -> None:
    """In a notebook the process goes on, and the tools are closed."""
    before, ended = len(list(Path("/proc/self/fd").iterdir())), threading.Event()

    def slow_to_end(given: Tools) -> str:
        try:
            return work(given)
        except KeyboardInterrupt:  # as if Ctrl-C had ended its stage
            time.sleep(0.2)
            ended.set()
            raise

    with closing(Prefetch()) as prefetch:
        start(prefetch, tools, Work(does=slow_to_end))
        assert runner.begun.wait(PATIENCE)

    assert ended.is_set()
    assert runner.stopped
    assert runner.limits == [1 << 30]  # its share of the memory
    assert tools.progress.lines == []
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_an_interrupt_in_its_turn_waits_for_its_end(tools: Any, runner: Blocked) -> None:
    """After an interrupted `join`, Python 3.11 and 3.12 take a running thread for an ended one."""
    ended = threading.Event()

    def interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    def slow_to_end(given: Tools) -> str:
        try:
            return work(given)
        except KeyboardInterrupt:
            time.sleep(0.2)
            ended.set()
            raise

    def strike() -> None:
        runner.begun.wait(PATIENCE)
        time.sleep(0.2)  # most likely it waits by then; before, nothing is shown
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, interrupt)
    striker = threading.Thread(target=strike)
    try:
        with closing(Prefetch()) as prefetch:
            slow = Work(does=slow_to_end)
            start(prefetch, tools, slow)
            striker.start()
            with pytest.raises(KeyboardInterrupt):
                prefetch.take(slow)
    finally:
        striker.join()
        signal.signal(signal.SIGUSR1, before)

    assert ended.is_set()


def test_work_that_waits_for_another_builds_lock_ends_with_the_block(tools: Any) -> None:
    waiting, ended = threading.Event(), threading.Event()

    def waits(_: Tools) -> str:
        waiting.set()
        try:
            check_stopped(PATIENCE)
        except KeyboardInterrupt:
            ended.set()
            raise
        return "it came free"

    with closing(Prefetch()) as prefetch:
        start(prefetch, tools, Work(does=waits))
        assert waiting.wait(PATIENCE)

    assert ended.is_set()
