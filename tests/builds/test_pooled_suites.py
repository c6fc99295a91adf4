"""An embedding model from its adapter to an image of llama.cpp that is judged by what it finds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from weightsmith.building.wiring import cache_folder

from tests.fakes import pooled_models
from tests.fakes.started import weightsmith

pytestmark = [pytest.mark.builders, pytest.mark.slow, pytest.mark.timeout(1800)]


def built(folder: Path, trained: Path, *settings: str) -> dict[str, Any]:
    """Build the trained model over a corpus; return build.json."""
    pooled_models.write_lines(folder / "corpus.jsonl", pooled_models.corpus())
    pooled_models.write_lines(folder / "queries.jsonl", pooled_models.queries(40))
    suite = {"data": "queries.jsonl", "metric": "embedding", "corpus": "corpus.jsonl"}
    recipe = {
        "name": "finder", "base": {"source": str(trained / "base")},
        "adapters": [{"source": str(trained / "adapter")}],
        "evaluate": {**suite, "max_drop": 0.1}, "targets": ["llamacpp-f16"],
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    words = [word for setting in settings for word in ("--set", setting)]
    told = weightsmith(
        "build", "--recipe", folder / "recipe.yaml", "--runner", "local", *words,
        "--dist", folder / "dist", "--layout", folder / "layout", store=folder / "store",
    )  # fmt: skip
    report = Path(told["targets"]["llamacpp-f16"]["report"])
    return dict(json.loads((report.parent / "build.json").read_text()))


def test_the_image_finds_what_base_and_adapter_find(tmp_path: Path) -> None:
    """And an image that pools otherwise is not proven, though it may find as much."""
    trained = pooled_models.made("embed", cache_folder() / "trained")
    record = built(tmp_path, trained)
    scores = {who: one["score"] for who, one in record["scores"].items()}
    assert scores["base"] < 0.6 < 0.9 < scores["adapter"]
    assert scores["image"] == pytest.approx(scores["adapter"], abs=0.005)
    assert record["scores"]["image"]["figures"]["recall@10"] > 0.9
    assert min(record["sameness"]["image"]["cosine"]) > 0.9999
    assert record["verdict"] == "passed"
    assert record["items"][0]["value"]["image"] > 0.5

    other = built(tmp_path, trained, "serve.extra.pooling=cls")
    assert other["verdict"] == "not proven"
    assert any("gives other vectors than the reference" in text for text in other["unproven"])
