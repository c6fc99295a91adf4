"""Ctrl-C, SIGTERM and kill -9 at any moment: nothing half-made is seen, nothing is left running."""

import signal
import time

import pytest

from tests.faults.workshop import Outcome, Workshop

pytestmark = pytest.mark.builders

STAGES = {
    "reference": ("reference",),
    "merge": ("merge",),
    "evaluate": ("smoke", "trial"),
    "quantize": ("quantize",),
}
"""The long stages, by what the store calls their results."""


TRIES = 8
"""Builds that a test disturbs at the most: now and then one is done before it can be caught."""


@pytest.mark.grid(4)
@pytest.mark.parametrize("stage", STAGES)
def test_an_interrupted_stage(workshop: Workshop, digest: str, stage: str) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        outcome = interrupted(workshop, stage, number)

        workshop.check_quiet()
        workshop.check_whole()
        assert "Traceback" not in outcome.err
        assert not (workshop.results / "image").exists()
        if number == signal.SIGKILL:
            assert outcome.code == -number, outcome
            continue
        assert outcome.code == 130, outcome
        assert outcome.told["error"]["exit_code"] == 130
        assert "interrupted" in outcome.err
        assert not list((workshop.folder / "tmp").iterdir())

    # An undisturbed build gives the image, and clears away what a killed one left.
    workshop.check_intact(digest)
    assert not list(workshop.store.glob("partial/*"))
    assert not list(workshop.cache.glob("jobs/*"))
    assert not list(workshop.results.glob(".*"))


def interrupted(workshop: Workshop, stage: str, number: signal.Signals) -> Outcome:
    for _ in range(TRIES):
        workshop.forget(*STAGES[stage])
        running = workshop.start_build()
        running.wait_for(f"{stage}:")
        # A started image answers the few questions in less than half a second, and the small
        # model is merged as quickly.
        time.sleep(0.1 if stage in ("evaluate", "merge") else 0.4)
        running.process.send_signal(number)
        outcome = running.end()
        if f"{stage}: done" not in outcome.err:
            return outcome
        assert outcome.code in (0, 130, -number), outcome
    raise AssertionError(f"{stage} is done too quickly to be interrupted")


def test_a_killed_trial_leaves_no_server_and_no_files(workshop: Workshop, digest: str) -> None:
    for _ in range(TRIES):
        workshop.forget(*STAGES["evaluate"])
        running = workshop.start_build()
        running.wait_for("evaluate:")
        caught = workshop.catch("llama-server", running)
        running.process.kill()
        if caught and running.end().code == -signal.SIGKILL:
            break
    else:
        raise AssertionError("no llama-server is seen")

    workshop.check_quiet()
    assert not (workshop.results / "image").exists()
    workshop.check_intact(digest)
    assert not list(workshop.cache.glob("jobs/*"))
    assert not list((workshop.folder / "tmp").iterdir())
