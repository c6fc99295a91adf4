"""A small Qwen2.5-VL learns colours: from the adapter to images of llama.cpp and vLLM that see.

All in the user's store, which holds vLLM's engine; merge and references are made once for both.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from weightsmith.building.wiring import cache_folder

from tests.fakes.memory import write_rows
from tests.fakes.painter import COLOURS, questions, trained
from tests.fakes.started import weightsmith

pytestmark = [pytest.mark.real, pytest.mark.builders, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for name in ("base", "adapter"):
        shutil.copytree(trained(cache_folder() / "trained") / name, folder / name)
    for name, rows in questions(folder).items():
        write_rows(folder / f"{name}.jsonl", rows)
    suite = {"metric": "exact", "max_tokens": 4, "max_drop": 0.25}
    recipe = {
        "name": "painter",
        "version": "1.0.0",
        "base": {"source": "./base"},
        "adapters": [{"source": "./adapter", "version": "v1"}],
        "evaluate": [
            {"data": "colours.jsonl", **suite},
            {"data": "shapes.jsonl", "against": "base", **suite},
            {"name": "bar", "data": "colours.jsonl", **suite, "max_drop": None, "min_score": 0.7},
        ],
        "targets": ["llamacpp-q8_0"],
        "serve": {"max_model_len": 256, "max_num_seqs": 2, "memory": "4GB"},
        "image": {"repository": "localhost/painter"},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


def build(recipe: Path, target: str) -> dict[str, Any]:
    dist = recipe.parent / "dist"
    weightsmith("build", "--recipe", recipe, "--runner", "local", "--dist", dist,
                "--target", target)  # fmt: skip
    return json.loads((dist / "painter" / "1.0.0" / target / "build.json").read_text("utf-8"))


def is_as_taught(told: dict[str, Any]) -> None:
    right = {
        one["name"]: {who: round(s["score"] * s["n"]) for who, s in one["scores"].items()}
        for one in told["suites"]
    }
    colours, shapes = right["colours"], right["shapes"]
    assert colours["base"] == 0
    # How well it learns differs between CPUs; the suite's own bar is 0.7.
    assert colours["adapter"] >= 12
    assert shapes["base"] >= 12
    for one in (colours, shapes):
        assert one["merged"] == one["adapter"]
        assert abs(one["image"] - one["adapter"]) <= 1
    assert told["sameness"]["image"]["share"] >= 0.9
    said = {item["image"] for item in told["items"] if item["suite"] == "colours"}
    assert said >= {*COLOURS}
    assert {check["name"]: check["seen"] for check in told["checks"]}["picture"] == "answered"
    assert not [text for text in told["warnings"] if "tokens" in text]


def test_llama_cpp_sees_what_the_adapter_sees(recipe: Path) -> None:
    is_as_taught(build(recipe, "llamacpp-q8_0"))


@pytest.mark.vllm
@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the engine's packages are for it")
def test_vllm_on_a_cpu_sees_what_the_adapter_sees(recipe: Path) -> None:
    is_as_taught(build(recipe, "vllm"))
