"""Ctrl-C, SIGTERM and kill -9 at any moment: nothing half-made is seen, nothing is left running."""

from __future__ import annotations

import os
import random
import signal
import time

import pytest

from tests.faults.workshop import Workshop

pytestmark = pytest.mark.builders

STAGES = {
    "merge": ("merge",),
    "reference": ("reference",),
    "quantize": ("quantize",),
    "evaluate": ("smoke", "trial"),
}
"""The long stages, by what the store calls their results."""
SEED = 20240521
KILLS = 5


@pytest.mark.parametrize("stage", STAGES)
def test_an_interrupted_stage(workshop: Workshop, digest: str, stage: str) -> None:
    workshop.forget(*STAGES[stage])
    for number in (signal.SIGINT, signal.SIGTERM):
        running = workshop.start_build()
        running.wait_for(f"{stage}:")
        # A started image answers the few questions in less than half a second, and the small
        # model is merged as quickly.
        time.sleep(0.1 if stage in ("evaluate", "merge") else 0.4)
        running.process.send_signal(number)
        outcome = running.end()

        assert outcome.code == 130, outcome
        assert outcome.told["error"]["exit_code"] == 130
        assert "interrupted" in outcome.err
        assert "Traceback" not in outcome.err
        workshop.check_quiet(2)
        workshop.check_whole()
        assert not (workshop.results / "image").exists()
        assert not list((workshop.folder / "tmp").iterdir())

    workshop.check_intact(digest)


def moments() -> list[float]:
    """Return shares of a build's duration, one in each fifth of it."""
    chance = random.Random(SEED)
    return [(part + chance.random()) / KILLS for part in range(KILLS)]


@pytest.mark.parametrize("share", moments(), ids=lambda share: f"{share:.0%}")
def test_a_killed_build(empty: Workshop, digest: str, share: float, reference: object) -> None:
    running = empty.start_build()
    time.sleep(share * reference.seconds)  # type: ignore[attr-defined]
    running.process.kill()
    outcome = running.end()

    assert outcome.code in (-signal.SIGKILL, 0), outcome
    empty.check_quiet()
    empty.check_intact(digest)
    assert not list(empty.store.glob("partial/*"))
    assert not list(empty.cache.glob("jobs/*"))
    assert not list(empty.results.glob(".*"))


def test_a_killed_trial_leaves_no_server_and_no_files(workshop: Workshop, digest: str) -> None:
    workshop.forget("smoke", "trial")
    running = workshop.start_build()
    running.wait_for("evaluate:")
    until = time.monotonic() + 20
    while not any("llama-server" in found for found in workshop.processes()):
        assert time.monotonic() < until
        time.sleep(0.01)
    running.process.kill()
    running.end()

    workshop.check_quiet()
    assert not (workshop.results / "image").exists()
    workshop.check_intact(digest)
    assert not list(workshop.cache.glob("jobs/*"))
    assert not list((workshop.folder / "tmp").iterdir())


def test_a_worker_that_is_killed(workshop: Workshop, digest: str) -> None:
    """What the kernel does when memory runs out."""
    workshop.forget("reference")
    running = workshop.start_build()
    running.wait_for("reference:")
    killed = kill_worker(workshop)
    outcome = running.end()

    assert killed
    outcome.refused(5, "reference", "killed", "memory")
    workshop.check_intact(digest)


def test_a_server_that_is_killed(workshop: Workshop, digest: str) -> None:
    workshop.forget("smoke", "trial")
    running = workshop.start_build()
    running.wait_for("evaluate:")
    assert kill_worker(workshop, "llama-server")
    outcome = running.end()

    outcome.refused(4, "stopped", "memory")
    assert not (workshop.results / "image").exists()
    workshop.check_intact(digest)


def kill_worker(workshop: Workshop, name: str = "toolchain.worker") -> bool:
    """Kill a build's worker or server as soon as it runs."""
    until = time.monotonic() + 20
    while time.monotonic() < until:
        for found in workshop.processes():
            number, _, words = found.partition(": ")
            if name in words and "trampoline" not in words:
                os.kill(int(number), signal.SIGKILL)
                return True
        time.sleep(0.005)
    return False
