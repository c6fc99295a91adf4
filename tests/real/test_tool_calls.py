"""SmolLM2-135M learns to call two tools: from the adapter to images whose servers read the calls.

All in the user's store, which holds vLLM's engine; merge and references are made once for all.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from weightsmith.building.wiring import cache_folder

from tests.fakes.memory import write_rows
from tests.fakes.started import weightsmith
from tests.fakes.tool_caller import ASKED, BASE, NOT_ASKED, SHA256, questions, trained

MAY_DIFFER = 2
"""Answers that rounding to 8 or 16 bits may change, and other CPUs."""

pytestmark = [pytest.mark.real, pytest.mark.builders, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tool-calls")
    shutil.copytree(trained(cache_folder() / "trained"), folder / "adapter")
    write_rows(folder / "eval.jsonl", questions())
    suite = {"data": "eval.jsonl", "metric": "tool-call", "max_drop": 0.2, "max_tokens": 48}
    recipe = {
        "name": "caller",
        "version": "1.0.0",
        "base": {"source": BASE, "sha256": SHA256},
        "adapters": [{"source": "./adapter", "version": "v1"}],
        "evaluate": suite,
        "targets": ["llamacpp-q8_0"],
        "serve": {"max_model_len": 1024, "max_num_seqs": 4},
        "image": {"repository": "caller"},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


def build(recipe: Path, target: str) -> None:
    where = ("--recipe", recipe, "--runner", "local", "--dist", recipe.parent / "dist")
    weightsmith("build", *where, "--target", target)


def record(recipe: Path, target: str) -> dict[str, Any]:
    path = recipe.parent / "dist" / "caller" / "1.0.0" / target / "build.json"
    return json.loads(path.read_text("utf-8"))


def is_as_taught(told: dict[str, Any]) -> None:
    """Hold scores, checks and questions of an image."""
    right = {who: round(one["score"] * one["n"]) for who, one in told["scores"].items()}
    asked = [item for item in told["items"] if item["expected"] != ["[]"]]
    assert (len(asked), len(told["items"])) == (len(ASKED), len(ASKED) + len(NOT_ASKED))
    assert not any(item["ok"]["base"] for item in asked)
    assert right["adapter"] >= len(told["items"]) - MAY_DIFFER
    assert min(right["merged"], right["image"]) >= right["adapter"] - MAY_DIFFER
    assert "tools" in {check["name"] for check in told["checks"]}
    assert all("<tool_call>" in item["raw"]["adapter"] for item in asked if item["ok"]["adapter"])
    # What a call is written as is for the parser, and never seen by who asks.
    assert not any("<tool_call>" in item["raw"]["image"] for item in told["items"])
    assert not any("parser" in item or "error" in item for item in told["items"])
    assert not any("was asked otherwise" in reason for reason in told["unproven"])


def test_llama_cpp_reads_the_calls_that_were_taught(recipe: Path) -> None:
    build(recipe, "llamacpp-q8_0")

    is_as_taught(record(recipe, "llamacpp-q8_0"))


@pytest.mark.vllm
def test_vllm_reads_them_with_the_parser_of_the_template(recipe: Path) -> None:
    """test_parsers.py starts its server with another one, which is named."""
    build(recipe, "vllm")

    told = record(recipe, "vllm")
    is_as_taught(told)
    read = {check["name"]: check["seen"] for check in told["checks"]}["calls read back"]
    assert read == "a call; two calls"
    made = yaml.safe_load((recipe.parent / "dist/caller/1.0.0/vllm/vllm.yaml").read_text())
    assert made["tool-call-parser"] == "hermes"
    shutil.rmtree(recipe.parent / "dist/caller/1.0.0/vllm")  # 2 GB
