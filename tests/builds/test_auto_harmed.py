"""The target `auto` on a model that four bits harm: what is left, and what is chosen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from weightsmith.building.wiring import cache_folder

from tests.fakes.small_weights import trained
from tests.fakes.started import weightsmith

pytestmark = [pytest.mark.builders, pytest.mark.full]


def test_four_bits_are_not_chosen_where_they_lose_the_facts(tmp_path: Path) -> None:
    """All of its facts sit in weights that are smaller than a step of four bits.

    It takes minutes: a model is trained once, and each smaller candidate is quantized.
    """
    model = trained(cache_folder() / "trained")
    recipe = {
        "name": "harmed",
        "version": "1.0.0",
        "base": {"source": str(model / "base")},
        "adapters": [{"source": str(model / "adapter"), "version": "v1"}],
        "evaluate": {"data": str(model / "eval.jsonl"), "max_drop": 0.15, "max_tokens": 32},
        "calibration": {"data": str(model / "calibration.jsonl")},
        "targets": ["auto"],
        "auto": {"engine": "llamacpp"},
        "serve": {"max_model_len": 256, "max_num_seqs": 4},
        "image": {"repository": "harmed"},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))

    told: Any = weightsmith(
        "build", "--recipe", tmp_path / "recipe.yaml", "--runner", "local",
        "--dist", tmp_path / "dist", store=tmp_path / "store",
    )  # fmt: skip

    built = told["targets"]["auto"]
    record = json.loads((Path(built["report"]).parent / "build.json").read_text())
    rows = record["auto"]["candidates"]
    left = [row for row in rows if row["seconds"] and row["left"]]
    (chosen,) = (row for row in rows if not row["left"])
    assert built["verdict"] == "passed"
    assert chosen["sequence"][0]["lost"] <= 2
    bits = 8 * chosen["size"] / _weights(model / "base")
    assert bits > 5
    assert {row["stage"] for row in left} <= {"quality", "evaluate"}
    assert any("q4" in row["target"] or row["options"].get("bits", 8) < 5 for row in left)


def _weights(base: Path) -> int:
    return (base / "model.safetensors").stat().st_size // 2
