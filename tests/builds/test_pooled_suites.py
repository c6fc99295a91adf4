"""From adapters to images of llama.cpp that are judged by what they find, or how they order it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from weightsmith.building.wiring import cache_folder

from tests.fakes import pooled_models, pooled_xlm
from tests.fakes.command_line import told as weightsmith
from tests.fakes.replays import replay_set

pytestmark = [pytest.mark.builders, pytest.mark.slow, pytest.mark.timeout(1800)]


def built(folder: Path, trained: Path, *settings: str) -> dict[str, Any]:
    """Build the trained model over a corpus; return build.json."""
    pooled_models.write_lines(folder / "corpus.jsonl", pooled_models.corpus())
    pooled_models.write_lines(folder / "queries.jsonl", pooled_models.queries(40))
    suite = {"data": "queries.jsonl", "metric": "embedding", "corpus": "corpus.jsonl"}
    recipe = pooled_models.write_recipe(folder, trained, {**suite, "max_drop": 0.1})
    words = [word for setting in settings for word in ("--set", setting)]
    told = weightsmith(
        "build", "--recipe", recipe, "--runner", "local", *words,
        "--dist", folder / "dist", "--layout", folder / "layout", store=folder / "store",
    )  # fmt: skip
    report = Path(told["targets"]["llamacpp-f16"]["report"])
    return dict(json.loads((report.parent / "build.json").read_text()))


def test_the_image_finds_what_base_and_adapter_find(tmp_path: Path) -> None:
    """And an image that pools otherwise is not proven, though it may find as much.

    Each is known elsewhere by its vectors: the room is far less than another pooling moves them.
    """
    trained = pooled_models.made("embed", cache_folder() / "trained")
    record = built(tmp_path, trained)
    scores = {who: one["score"] for who, one in record["scores"].items()}
    assert scores["base"] < 0.6 < 0.9 < scores["adapter"]
    assert scores["image"] == pytest.approx(scores["adapter"], abs=0.005)
    assert record["scores"]["image"]["figures"]["recall@10"] > 0.9
    assert min(record["sameness"]["image"]["cosine"]) > 0.9999
    assert record["verdict"] == "passed"
    assert record["items"][0]["value"]["image"] > 0.5

    layout = tmp_path / "layout"
    told = weightsmith("prove", "--image", f"oci:{layout}", "--runner", "local")
    assert (told["verdict"], told["questions"]) == ("proven", record["replay"]["questions"])
    assert told["room_used"]["largest"] < 0.5
    tested = replay_set(layout)

    other = built(tmp_path, trained, "serve.extra.pooling=cls")
    assert other["verdict"] == "not proven"
    assert any("gives other vectors than the reference" in text for text in other["unproven"])
    pairs = zip(tested["questions"], replay_set(layout)["questions"], strict=True)
    for one, another in pairs:
        left, right = (np.array(each["numbers"]) for each in (one, another))
        cosine = left @ right / np.linalg.norm(left) / np.linalg.norm(right)
        assert one["request"] == another["request"]
        assert 1 - cosine > 3 * one["room"]


@pytest.mark.full
def test_the_image_orders_documents_as_base_and_adapter_do(tmp_path: Path) -> None:
    """The adapter brings the head to an encoder that was saved alone, with its own vocabulary."""
    trained = pooled_xlm.made(cache_folder() / "trained")
    pooled_models.write_lines(tmp_path / "pairs.jsonl", pooled_models.candidates(60))
    suite = {"data": "pairs.jsonl", "metric": "rerank", "max_drop": 0.05}
    recipe = pooled_models.write_recipe(tmp_path, trained, suite)
    told = weightsmith(
        "build", "--recipe", recipe, "--runner", "local",
        "--dist", tmp_path / "dist", store=tmp_path / "store",
    )  # fmt: skip
    report = Path(told["targets"]["llamacpp-f16"]["report"])
    record = json.loads((report.parent / "build.json").read_text())

    scores = {who: one["score"] for who, one in record["scores"].items()}
    assert record["verdict"] == "passed"
    assert scores["adapter"] > 0.85
    assert scores["merged"] == pytest.approx(scores["adapter"], abs=1e-3)
    assert scores["image"] == pytest.approx(scores["adapter"], abs=0.02)
    assert "base" not in scores, "it has no head of its own"
