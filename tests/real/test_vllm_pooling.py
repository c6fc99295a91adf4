"""From an adapter to a started image of vLLM on a CPU, for models that do not chat."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from tests.fakes import encoders
from tests.fakes.encoders import TEXTS, adapted, mean_vectors
from tests.fakes.started import weightsmith
from tests.real.test_vllm import started_image

pytestmark = [
    pytest.mark.builders, pytest.mark.vllm, pytest.mark.full, pytest.mark.timeout(1800),
    pytest.mark.filterwarnings("ignore"),
]  # fmt: skip


def test_vectors_are_those_of_base_and_adapter(tmp_path: Path) -> None:
    base = encoders.bert(tmp_path / "base")
    unmerged = adapted(base, tmp_path / "adapter", "FEATURE_EXTRACTION")
    expected = mean_vectors(unmerged, AutoTokenizer.from_pretrained(base), TEXTS).numpy()

    # In the user's store: the engine is made once for a machine.
    told: dict[str, Any] = weightsmith(
        "build", "--base", base, "--adapter", tmp_path / "adapter", "--target", "vllm",
        "--runner", "local", "--dist", tmp_path / "dist", "--set", "name=m",
        "--layout", tmp_path / "image",
    )["targets"]["vllm"]  # fmt: skip
    with started_image(tmp_path / "image") as client:
        answer = client.post("/v1/embeddings", json={"model": "m", "input": list(TEXTS)})
    found = np.array([row["embedding"] for row in answer.raise_for_status().json()["data"]])

    assert (found * expected).sum(1).min() > 0.9999
    record = json.loads((Path(told["report"]).parent / "build.json").read_text())
    checks = {check["name"]: check["seen"] for check in record["checks"]}
    assert checks["embed"] == "256 numbers, length 1.000"
    assert checks["SIGTERM"].endswith("a request was answered")
