"""An image that cannot be started here: its weights answer the questions in transformers."""

from __future__ import annotations

import json

import pytest
from weightsmith.errors import CheckFailed

from tests.fakes.baking import push_base
from tests.fakes.memory import QUESTIONS, Memory, questions

TARGET = "vllm-fp8"


@pytest.fixture
def on_gpu(memory: Memory) -> Memory:
    """The same build for a GPU, which is not here."""
    base, labels = f"{memory.registry.host}/engines/vllm:1", {"dev.weightsmith.engine": "vllm"}
    push_base(memory.client, base, labels, {"usr/bin/vllm": b"#!/usr/bin/python3"}, "linux/amd64")
    memory.write_recipe(
        targets=[TARGET],
        image={"repository": memory.repository, "base": base},
        serve={"max_model_len": 256, "max_num_seqs": 2, "gpu": "nvidia-h100-80gb"},
    )
    return memory


def test_the_record_says_that_the_weights_answered_and_not_the_image(on_gpu: Memory) -> None:
    on_gpu.build()

    record = on_gpu.record(TARGET)
    assert {who: score["score"] for who, score in record["scores"].items()} == {
        "base": 0, "adapter": 1, "merged": 1, "dequantized": 1,
    }  # fmt: skip
    said = "the image was not asked; its dequantized weights were, in transformers"
    assert record["unproven"][0] == said
    (verdict,) = (one for one in record["verdicts"] if one["subject"] == "dequantized")
    assert (verdict["against"], verdict["binding"], verdict["passed"]) == ("adapter", True, True)
    report = (on_gpu.results(TARGET) / "report.md").read_text()
    assert f"| dequantized weights, in transformers | {QUESTIONS} of {QUESTIONS} |" in report
    assert on_gpu.jobs().count("dequantized") == 1

    on_gpu.build()
    assert on_gpu.jobs() == []


def test_weights_that_forgot_are_not_published(on_gpu: Memory) -> None:
    on_gpu.minds.forgot["dequantized"] = {prompt for prompt, _ in questions("a")[:3]}

    with pytest.raises(CheckFailed, match="the dequantized model in transformers scores"):
        on_gpu.build()
    assert on_gpu.seen() == ["1", "refused"]  # the engine, and the report


def test_what_keeps_the_merged_weights_is_not_asked_again(on_gpu: Memory) -> None:
    on_gpu.build(targets=["vllm"])

    assert "dequantized" not in on_gpu.jobs()
    assert on_gpu.record("vllm")["unproven"][0] == "the image was not asked"


@pytest.mark.parametrize("sees", [True, False])
def test_the_report_says_that_no_picture_was_tried(on_gpu: Memory, sees: bool) -> None:
    config = on_gpu.home / "base" / "config.json"
    tower = {"vision_config": {"hidden_size": 8, "num_hidden_layers": 1}} if sees else {}
    config.write_text(json.dumps({**json.loads(config.read_text()), **tower}))

    on_gpu.build(targets=["vllm"])

    assert on_gpu.record("vllm")["image"].get("takes_pictures", False) == sees
    banner, rest, _ = (on_gpu.results("vllm") / "report.html").read_text().partition("</div>")
    assert rest
    said = "no picture was tried, because the image was not started"
    assert (said in banner.lower()) == sees
    assert any("no picture was tried" in text for text in on_gpu.progress.warnings) == sees
