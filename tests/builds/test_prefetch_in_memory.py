"""Builds in memory whose weights are made beside validation and reference answers."""

from __future__ import annotations

import json
import os
import select
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
from weightsmith.core.errors import CacheLost, CheckFailed, InputRefused, WeightsmithError
from weightsmith.core.jobs import Job
from weightsmith.core.ports import Progress
from weightsmith.steps.tools import JobMemory

from tests.fakes.jobs import LOSSY, WRONG
from tests.fakes.memory import Memory
from tests.fakes.runner import MemoryRunner

TARGET = "llamacpp-q4_k_m"
AHEAD = ("quantize", "quality")
PATIENCE = 120.0
"""Seconds that nothing here takes."""


@dataclass
class Paired(MemoryRunner):
    """Validates only once quantizing has begun, and quantizes only once the validation is done."""

    begun: threading.Event = field(default_factory=threading.Event)
    proven: int = field(default_factory=lambda: os.eventfd(0))
    """Can be read once quantizing may go on."""
    slow: bool = False
    """Whether quantizing does not end by itself."""
    stopped: bool = False
    limits: dict[str, int] = field(default_factory=dict)

    def run(self, job: Job, progress: Progress, *, stop: int | None = None) -> Mapping[str, Any]:
        self.limits[job.kind] = job.memory_bytes
        if job.kind == "proof":
            assert self.begun.wait(PATIENCE)
            try:
                return super().run(job, progress)
            finally:
                if not self.slow:
                    os.eventfd_write(self.proven, 1)
        if job.kind == "quantize":
            (job.output / "half").write_text("of it")
            self.begun.set()
            waited = [one for one in (stop, self.proven) if one is not None]
            if stop in select.select(waited, [], [], PATIENCE)[0]:
                self.stopped = True
                raise InterruptedError
            (job.output / "half").unlink()
        return super().run(job, progress)

    def let_go(self) -> None:
        """Wait for nothing."""
        self.begun.set()
        os.eventfd_write(self.proven, 1)


@pytest.fixture
def paired(memory: Memory) -> Memory:
    """A machine on which a build ends only if two of its jobs run at once."""
    memory.two_at_once = True
    equip(memory)
    return memory


def equip(memory: Memory) -> Paired:
    runner = Paired(stages=memory.bench.stages, journal=memory.journal, prepared=["gguf", "merge"])
    memory.runner = runner
    return runner


def alone(memory: Memory) -> Memory:
    """Return the same where one job runs after the other."""
    memory.two_at_once = False
    equip(memory).let_go()
    memory.progress.lines.clear()
    return memory


def runner_of(memory: Memory) -> Paired:
    assert isinstance(memory.runner, Paired)
    return memory.runner


def shown(memory: Memory) -> list[tuple[str, ...]]:
    """Return what a user sees, but for how far a bar was when its turn came."""
    return [line for line in memory.progress.lines if line[0] != "advance"]


def test_image_record_and_all_that_is_shown_are_the_same(paired: Memory, digest: str) -> None:
    paired.bench.quantized["warnings"] = ["a warning of the quantizer"]
    built = paired.build()[TARGET]
    record, seen = paired.record(), shown(paired)
    assert ("warn", "a warning of the quantizer") in seen

    paired.store.entries.clear()
    again = alone(paired).build()[TARGET]

    assert built.published.digest == again.published.digest == digest
    assert seen == shown(paired)
    assert list(record["stages"]) == list(paired.record()["stages"])
    assert record["warnings"] == paired.record()["warnings"]


@pytest.mark.parametrize("where", ["validate", "reference"])
def test_a_refusal_ends_quantizing_and_is_told_as_ever(
    paired: Memory, digest: str, where: str
) -> None:
    runner_of(paired).slow = True
    right = dict(paired.bench.valid)
    if where == "validate":
        paired.bench.valid |= {"passed": False, "findings": [WRONG]}
    else:
        paired.minds.forgot["merged"] = set(paired.minds.facts)
    told = refusal(paired)

    assert runner_of(paired).stopped
    assert not set(told["stages"]) & set(AHEAD)
    assert not set(paired.store.made()) & set(AHEAD)
    assert paired.store.half() == ["quantize"]  # as after Ctrl-C: it is gone on with

    paired.store.entries.clear()
    assert told == refusal(alone(paired))
    paired.bench.valid, paired.minds.forgot = right, {}
    paired.store.entries.clear()
    assert alone(paired).build()[TARGET].published.digest == digest


def refusal(memory: Memory) -> dict[str, Any]:
    """Build what is refused; return what is told of it, without its times."""
    with pytest.raises(CheckFailed) as caught:
        memory.build()
    record = json.loads((memory.dist / "tiny/1.0.0/refused/build.json").read_text())
    said = [line for line in shown(memory) if line[0] != "finish"]
    kept = {key: record[key] for key in ("refused", "verdict", "warnings", "memory_bytes")}
    error = (caught.value.exit_code, caught.value.message, caught.value.hint)
    return {**kept, "stages": list(record["stages"]), "error": error, "said": said}


@pytest.mark.parametrize(
    ("kind", "error"),
    [("quantize", InputRefused), ("quality", InputRefused), ("quality", CheckFailed)],
)
def test_an_error_ahead_is_raised_in_its_turn(
    paired: Memory, kind: str, error: type[WeightsmithError]
) -> None:
    if error is InputRefused:
        paired.journal.faults[f"job {kind}"] = InputRefused("it cannot be read", hint="get another")
    else:
        paired.bench.quality.clear()
        paired.bench.quality.update(LOSSY)
    with pytest.raises(error):
        paired.build()

    assert {"validate", "reference"} < set(paired.store.made())
    stages = [line[1] for line in shown(paired) if line[0] == "stage"]
    assert stages == ["resolve", "merge", "validate", "reference", *AHEAD][: 5 + AHEAD.index(kind)]


@pytest.mark.parametrize("moment", ["job proof", "stage quantize"])
def test_an_interrupt_ends_both_and_the_next_build_goes_on(
    paired: Memory, digest: str, moment: str
) -> None:
    """Also while only quantizing is left."""
    runner_of(paired).slow = True
    paired.journal.faults[moment] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        paired.build()

    assert runner_of(paired).stopped
    assert paired.store.half() == ["quantize"]
    assert not [one for one in threading.enumerate() if one.name == "ahead"]
    assert alone(paired).build()[TARGET].published.digest == digest


def test_a_lost_result_of_a_shared_cache_begins_both_again(paired: Memory, digest: str) -> None:
    paired.journal.faults["job proof"] = CacheLost("the cache is damaged", hint="clean it")
    kept = runner_of(paired).run

    def lost(job: Job, progress: Progress, *, stop: int | None = None) -> Mapping[str, Any]:
        try:
            return kept(job, progress, stop=stop)
        except WeightsmithError:  # which a job cannot raise: it comes from the store
            raise CacheLost("the cache is damaged", hint="clean it") from None

    runner_of(paired).run = lost  # type: ignore[method-assign]
    assert paired.build()[TARGET].published.digest == digest


@pytest.mark.parametrize(
    ("limit", "together"), [(0, True), (16 << 30, True), (4 << 30, True), (3 << 29, False)]
)
def test_two_jobs_get_no_more_memory_than_one_may_use(
    paired: Memory, limit: int, *, together: bool
) -> None:
    """With --memory, what both need must fit; the plan says the sum where it does."""
    paired.room = JobMemory(limit=limit, budget=limit)
    runner = runner_of(paired)
    if not together:
        runner.let_go()
    planned = paired.forecast()["peak_memory_bytes"]
    paired.two_at_once = False
    one_by_one = paired.forecast()["peak_memory_bytes"]
    paired.two_at_once = True
    paired.build()

    assert (planned > one_by_one) == together
    assert not limit or planned <= limit
    if limit and together:
        assert runner.limits["proof"] + runner.limits["quantize"] <= limit


def test_a_builder_that_is_still_to_be_made_is_made_in_its_turn(memory: Memory) -> None:
    memory.two_at_once = True
    memory.build()

    events = [event for event in memory.journal.events if event.startswith("job ")]
    assert events[:4] == ["job merge", "job proof", "job quantize", "job quality"]
