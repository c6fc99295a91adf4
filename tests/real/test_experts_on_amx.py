"""A model with experts and its adapter in 8 bits, in an image of vLLM on a CPU with AMX.

Without AMX vLLM has no kernels for quantized experts: test_experts_in_memory.py builds such images
there, and their weights answer. `make test-all` runs this one.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from weightsmith.building.wiring import cache_folder
from weightsmith.core.cpus import flags
from weightsmith.serving.devices import AMX_FLAGS

from tests.fakes.experts import trained
from tests.fakes.started import weightsmith

TARGETS = ["vllm-w8a8", "vllm-fp8-block"]
QUESTIONS = 60

pytestmark = [
    pytest.mark.real,
    pytest.mark.builders,
    pytest.mark.vllm,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(
        not flags() >= AMX_FLAGS, reason="this CPU has no AMX, which vLLM's kernels for experts use"
    ),
]


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("amx")
    model = trained("qwen3_moe", cache_folder() / "trained")
    recipe = {
        "name": "experts",
        "version": "1.0.0",
        "base": {"source": str(model / "base")},
        "adapters": [{"source": str(model / "adapter"), "version": "v1"}],
        "evaluate": {"data": str(model / "eval.jsonl"), "metric": "contains", "max_drop": 0.05,
                     "max_tokens": 32},
        "serve": {"gpu": "cpu-amx", "max_model_len": 256, "max_num_seqs": 2},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    targets = (f"--target={target}" for target in TARGETS)
    weightsmith("build", "--recipe", folder / "recipe.yaml", *targets, "--runner", "local",
                "--dist", folder / "dist")  # fmt: skip
    yield folder / "dist" / "experts" / "1.0.0"
    shutil.rmtree(folder)


@pytest.mark.parametrize("target", TARGETS)
def test_the_started_image_answers_what_the_adapter_taught(dist: Path, target: str) -> None:
    record = json.loads((dist / target / "build.json").read_text())

    right = {who: score["score"] * score["n"] for who, score in record["scores"].items()}
    assert right.pop("base") <= 1
    assert right["adapter"] == QUESTIONS
    assert right["image"] >= QUESTIONS - 3
    assert record["image"]["started"] == "linux/amd64"
    assert not any("was not asked" in text for text in record["unproven"])
    assert {"chat", "streaming", "restart"} <= {check["name"] for check in record["checks"]}
