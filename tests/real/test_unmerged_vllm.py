"""Several adapters beside the base, served by vLLM on a CPU: each answers its own task."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.fakes.started import weightsmith
from tests.paths import TINY

pytestmark = [pytest.mark.real, pytest.mark.builders, pytest.mark.timeout(3600)]


def test_each_adapter_answers_its_own_task_by_its_name(tmp_path: Path) -> None:
    weightsmith("build", "--recipe", TINY / "recipe-two.yaml", "--target", "vllm-lora", "--runner",
                "local", "--dist", tmp_path / "dist", "--layout", tmp_path / "image")  # fmt: skip
    record = json.loads((tmp_path / "dist/tiny-two/1.0.0/vllm-lora/build.json").read_text())

    settings = record["plan"]["settings"]
    assert (settings["max-loras"], settings["max-lora-rank"]) == (2, 8)
    told = (record, *record["more_tasks"])
    assert len(told) == 2
    for task in told:
        scores = {name: score["score"] for name, score in task["scores"].items()}
        assert scores["base"] < 0.2
        # vLLM computes in the checkpoint's bfloat16, the reference in float32.
        assert scores["image"] >= scores["adapter"] - 0.1
