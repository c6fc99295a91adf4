"""Ctrl-C, SIGTERM and kill -9 at any moment: nothing half-made is seen, nothing is left running."""

import os
import signal
import time
from contextlib import suppress

import pytest
from weightsmith.steps.answer_checkpoint import checkpointed_answers

from tests.faults.workshop import Outcome, Workshop

pytestmark = pytest.mark.builders

STAGES = {
    "reference": ("reference",),
    "merge": ("merge",),
    "evaluate": ("smoke", "trial"),
    "quantize": ("quantize",),
}
"""The long stages, by what the store calls their results."""


MODELS = 3
"""Base, base with adapter, and merged model answer the questions."""


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


def killed(workshop: Workshop, name: str, stage: str) -> Outcome:
    """Kill a build's worker or server as soon as it runs: what the kernel does without memory."""
    for _ in range(TRIES):
        workshop.forget(*STAGES[stage])
        running = workshop.start_build()
        running.wait_for(f"{stage}:")
        if number := workshop.catch(name, running):
            with suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        outcome = running.end()
        if outcome.code != 0:
            return outcome
    raise AssertionError(f"no {name} is seen")


@pytest.mark.full  # tests/unit/steps/test_joined.py and stages/test_reference.py keep them
def test_the_answers_of_a_killed_validation_are_kept(workshop: Workshop, digest: str) -> None:
    for _ in range(TRIES):
        workshop.forget("validate", "reference")
        running = workshop.start_build()
        while running.process.poll() is None:  # the validation comes after all answers
            partial = workshop.store.glob("partial/*/data")
            if any(len(checkpointed_answers(path)) == MODELS for path in partial):
                running.process.kill()
        outcome = running.end()
        if "validate: done" not in outcome.err:
            break
    assert outcome.code == -signal.SIGKILL, "the validation is done too quickly to be killed"
    workshop.check_quiet()

    built = workshop.build()

    assert built.digest == digest
    assert not built.stages["validate"]["cached"]
    assert built.stages["reference"]["cached"]


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


@pytest.mark.full  # test_refusals_in_memory.py and tests/contracts/test_runner.py show it
def test_a_worker_that_is_killed(workshop: Workshop, digest: str) -> None:
    outcome = killed(workshop, "weightsmith.worker", "reference")

    outcome.refused(5, "reference", "killed", "memory")
    workshop.check_intact(digest)


@pytest.mark.full  # test_refusals_in_memory.py has servers that end
def test_a_server_that_is_killed(workshop: Workshop, digest: str) -> None:
    outcome = killed(workshop, "llama-server", "evaluate")

    error = outcome.refused(4)
    # Caught late, it was told to end already.
    assert "SIGTERM" in error["message"] or (
        "stopped" in error["message"] and "memory" in error["hint"]
    )
    assert not (workshop.results / "image").exists()
    workshop.check_intact(digest)
