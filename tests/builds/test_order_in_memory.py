"""A build in memory: what happens, and in which order."""

from __future__ import annotations

import base64
import json

import pytest
from weightsmith.building import graph
from weightsmith.core.errors import CheckFailed
from weightsmith.provenance.signing import check_by
from weightsmith.steps.tools import JobMemory

from tests.fakes.jobs import WRONG
from tests.fakes.memory import QUESTIONS, STAGES, Memory, new_signer

TARGET = "llamacpp-q4_k_m"


def test_what_happens_in_which_order(memory: Memory) -> None:
    """The registry is asked for leave first and written to last, and its tag is the last of all."""
    built = memory.build(push=True)[TARGET]

    assert [e for e in memory.journal.events if not e.startswith("finish")] == [
        "send",  # an upload opened and given up: is pushing allowed?
        "stage resolve", "make healthcheck for linux/amd64",
        "stage merge", "job merge",
        "stage validate", "job proof",
        "stage reference",
        "stage quantize", "job quantize",
        "stage quality", "job quality",
        "stage render",
        "stage bake", "job export-engine",
        "stage evaluate", "load candidate", "start", "stop",
        "stage publish", "untag candidate", "send",
        f"tag sha256-{built.published.digest.removeprefix('sha256:')}",
        f"tag 1.0.0-{TARGET}-{built.published.digest.short}",
        f"tag 1.0.0-{TARGET}",
    ]  # fmt: skip
    assert memory.left() == []


def test_validation_and_reference_are_two_jobs_if_one_has_too_little_memory(
    memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph, "_LEFT", 1 << 40)
    memory.room = JobMemory(limit=8 << 30, budget=4 << 30)
    memory.build()

    jobs = [event for event in memory.journal.events if event.startswith("job ")]
    assert jobs[:3] == ["job merge", "job validate", "job reference"]


def test_answers_outlive_a_validation_that_fails(memory: Memory) -> None:
    right = dict(memory.bench.valid)
    memory.bench.valid |= {"passed": False, "findings": [WRONG]}
    with pytest.raises(CheckFailed, match="differs"):
        memory.build()
    memory.bench.valid = right
    memory.journal.events.clear()
    memory.build()

    assert "job validate" in memory.journal.events
    assert "job proof" not in memory.journal.events
    assert "job reference" not in memory.journal.events


def test_each_stage_says_how_long_it_took_by_the_clock_of_its_tools(
    memory: Memory, digest: str
) -> None:
    built = memory.build()[TARGET]

    assert built.published.digest == digest  # of another build of the same inputs
    assert tuple(built.stages) == STAGES
    assert {name: facts.seconds for name, facts in built.stages.items()} == {
        **dict.fromkeys(STAGES, 1.0),
        "publish": 3.0,  # which looks at the clock itself
    }


def test_the_merged_model_and_the_image_are_held_against_the_adapter(memory: Memory) -> None:
    built = memory.build()[TARGET]
    record = memory.record()
    asked = [json.loads(line) for line in (memory.home / "a.jsonl").read_text().splitlines()]

    assert {name: score.score for name, score in built.scores.items()} == {
        "base": 0, "adapter": 1, "merged": 1, "image": 1,
    }  # fmt: skip
    assert [(v["subject"], v["against"], v["passed"]) for v in record["verdicts"]] == [
        ("merged", "adapter", True), ("image", "adapter", True), ("image", "merged", True),
    ]  # fmt: skip
    assert [check["name"] for check in record["checks"]] == [
        "health", "model list", "chat", "streaming", "end of answer", "context limit",
        "2 requests at once", "log-probabilities", "SIGTERM", "restart",
    ]  # fmt: skip
    questions = [question for _, question in memory.launcher.asked if question != "Hello"]
    assert questions == [row["prompt"] for row in asked]
    assert len(questions) == QUESTIONS


def test_what_hangs_on_a_pushed_image_is_signed(memory: Memory) -> None:
    memory.signer = new_signer()
    digest = memory.build(push=True)[TARGET].published.digest
    (signature,) = (
        json.loads(body)
        for (_, tag), (_, body) in memory.registry.manifests.items()
        if tag == f"{digest.replace(':', '-')}.sig"
    )
    (layer,) = signature["layers"]
    claim = memory.registry.blobs["team/tiny", layer["digest"]]
    signed = base64.b64decode(layer["annotations"]["dev.cosignproject.cosign/signature"])

    assert json.loads(claim)["critical"]["image"]["docker-manifest-digest"] == digest
    assert check_by(memory.signer.public)(claim, signed)
