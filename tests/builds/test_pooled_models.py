"""From an adapter to a started image of llama.cpp, for models that do not chat.

Vectors and scores are compared with base and adapter unmerged in transformers and PEFT.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer
from weightsmith.building.wiring import open_tools
from weightsmith.core.ports import Silent, StartSpec
from weightsmith.evaluating.client import wait_until_healthy
from weightsmith.models.task import read_task
from weightsmith.recipe.user_config import RunOptions

from tests.fakes import encoders, pooled_models, token_rerankers
from tests.fakes.encoders import TEXTS, adapted, mean_vectors
from tests.fakes.started import weightsmith

pytestmark = [
    pytest.mark.builders,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.timeout(1800),
]
QUERY, DOCUMENTS = TEXTS[0], TEXTS[1:]


def built(folder: Path, target: str) -> dict[str, Any]:
    """Build base and adapter of a folder; return the target's part of the result."""
    told = weightsmith(
        "build", "--base", folder / "base", "--adapter", folder / "adapter", "--target", target,
        "--runner", "local", "--dist", folder / "dist", "--set", "name=m", store=folder / "store",
    )  # fmt: skip
    return dict(told["targets"][target])


@contextmanager
def asked(image: str, port: int, seconds: float = 120) -> Iterator[httpx.Client]:
    """Start an image of a layout; yield a client of its server."""
    spec = StartSpec(
        port=port, env={}, port_variable="LLAMA_ARG_PORT", host_variable="LLAMA_ARG_HOST",
        memory_bytes=1 << 30,
    )  # fmt: skip
    with (
        open_tools(RunOptions(runner="local"), Silent()) as tools,
        tools.launcher.serve(image, spec) as endpoint,
    ):
        wait_until_healthy(endpoint, "/health", seconds)
        with httpx.Client(base_url=endpoint.url, timeout=300) as client:
            yield client


def vectors(client: httpx.Client, texts: Sequence[str] = TEXTS) -> np.ndarray:
    answer = client.post("/v1/embeddings", json={"model": "m", "input": list(texts)})
    assert answer.status_code == 200, answer.text
    return np.array([row["embedding"] for row in answer.json()["data"]])


def checks(told: dict[str, Any]) -> dict[str, str]:
    record = json.loads((Path(told["report"]).parent / "build.json").read_text())
    return {check["name"]: check["seen"] for check in record["checks"]}


@pytest.mark.full  # test_pooled_suites.py holds the image against the same vectors
def test_vectors_are_those_of_base_and_adapter(tmp_path: Path) -> None:
    base = encoders.bert(tmp_path / "base")
    unmerged = adapted(base, tmp_path / "adapter", "FEATURE_EXTRACTION")
    expected = mean_vectors(unmerged, AutoTokenizer.from_pretrained(base), TEXTS).numpy()

    told = built(tmp_path, "llamacpp-f16")
    with asked(told["image"], 8080) as client:
        found = vectors(client)

    assert (found * expected).sum(1).min() > 0.9999
    with unmerged.disable_adapter():
        base_alone = mean_vectors(unmerged, AutoTokenizer.from_pretrained(base), TEXTS).numpy()
    assert (found * base_alone).sum(1).max() < 0.99, "the adapter is in it"
    seen = checks(told)
    assert seen["embed"] == "256 numbers, length 1.000"
    assert seen["SIGTERM"].endswith("a request was answered")


@pytest.mark.full
def test_a_distilbert_gives_its_vectors(tmp_path: Path) -> None:
    base = encoders.distilbert(tmp_path / "base")
    unmerged = adapted(base, tmp_path / "adapter", "FEATURE_EXTRACTION")
    expected = mean_vectors(unmerged, AutoTokenizer.from_pretrained(base), TEXTS).numpy()

    with asked(built(tmp_path, "llamacpp-f16")["image"], 8080) as client:
        found = vectors(client)

    assert (found * expected).sum(1).min() > 0.9999


@pytest.mark.full
@pytest.mark.parametrize("mapped", [False, True])
def test_an_own_vocabulary_of_sentence_pieces_cuts_texts_as_transformers_does(
    tmp_path: Path, mapped: bool
) -> None:
    """Without a map of characters, or with one; blanks count once."""
    base = encoders.xlm_roberta(tmp_path / "base", mapped=mapped)
    unmerged = adapted(base, tmp_path / "adapter", "FEATURE_EXTRACTION")
    texts = (*TEXTS, "  two   blanks  red")
    expected = mean_vectors(unmerged, AutoTokenizer.from_pretrained(base), texts).numpy()

    with asked(built(tmp_path, "llamacpp-f16")["image"], 8080) as client:
        found = vectors(client, texts)

    assert (found * expected).sum(1).min() > 0.9999


@pytest.mark.full
@pytest.mark.parametrize("target", ["llamacpp-q8_0", "llamacpp-q4_k_m"])
def test_vectors_of_quantized_weights_are_near(tmp_path: Path, target: str) -> None:
    base = encoders.bert(tmp_path / "base")
    unmerged = adapted(base, tmp_path / "adapter", "FEATURE_EXTRACTION")
    expected = mean_vectors(unmerged, AutoTokenizer.from_pretrained(base), TEXTS).numpy()

    with asked(built(tmp_path, target)["image"], 8080) as client:
        nearness = (vectors(client) * expected).sum(1).min()

    assert nearness > (0.999 if target.endswith("q8_0") else 0.97)


@pytest.mark.full
def test_scores_of_pairs_are_those_of_base_and_adapter(tmp_path: Path) -> None:
    """The adapter brings the head, with one label, to a base that gives vectors."""
    base = encoders.roberta(tmp_path / "base")
    unmerged = adapted(base, tmp_path / "adapter", "SEQ_CLS", num_labels=1)
    pairs = AutoTokenizer.from_pretrained(base)(
        [QUERY] * len(DOCUMENTS), list(DOCUMENTS), padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        expected = unmerged(**pairs).logits[:, 0].numpy()

    told = built(tmp_path, "llamacpp-f16")
    with asked(told["image"], 8080) as client:
        body = {"model": "m", "query": QUERY, "documents": list(DOCUMENTS)}
        rows = client.post("/v1/rerank", json=body).json()["results"]
    found = {row["index"]: row["relevance_score"] for row in rows}

    assert np.abs([found[n] for n in range(len(DOCUMENTS))] - expected).max() < 0.01
    assert np.ptp(expected) > 0.1, "documents are told apart"
    assert "scores" in checks(told)["rerank"]


@pytest.mark.full  # tests/unit/merging/test_new_heads.py holds the tensors
def test_a_head_lands_in_the_checkpoint_with_its_labels(tmp_path: Path) -> None:
    base = encoders.bert(tmp_path / "base")
    adapted(base, tmp_path / "adapter", "SEQ_CLS", num_labels=3)
    weightsmith(
        "merge", "--base", base, "--adapter", tmp_path / "adapter", "--runner", "local",
        "--out", tmp_path / "merged",
    )  # fmt: skip
    merged = tmp_path / "merged"
    config = json.loads((merged / "config.json").read_text())
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    found = load_file(merged / "model.safetensors")

    assert config["architectures"] == ["BertForSequenceClassification"]
    assert config["id2label"] == {str(n): f"LABEL_{n}" for n in range(3)}
    assert torch.equal(found["classifier.weight"], stored["base_model.model.classifier.weight"])
    assert read_task(merged).kind == read_task(base, tmp_path / "adapter").kind == "classify"
    assert not (merged / "modules.json").exists(), "it said how vectors are made"
    told = weightsmith(
        "validate", "--base", base, "--adapter", tmp_path / "adapter", "--merged", merged
    )
    assert not [one for one in told["findings"] if one["severity"] == "error"]


@pytest.mark.full  # tests/unit/merging/test_pooled.py holds the reference
@pytest.mark.parametrize("tied", [True, False])
def test_a_reranker_by_two_tokens_scores_as_base_and_adapter(tmp_path: Path, tied: bool) -> None:
    """With the model's own prompt and tokens; the suite asks the image what the adapter says."""
    base = tmp_path / "base"
    token_rerankers.written(base, tied=tied)
    unmerged = token_rerankers.adapted(base, tmp_path / "adapter")
    rows = []
    for query in ("Who sleeps?", "Is it raining?", "When does the train leave?"):
        said = token_rerankers.scores(unmerged, base, query, list(DOCUMENTS))
        rows.append(
            {"query": query, "documents": list(DOCUMENTS), "expected": int(np.argmax(said))}
        )
    pooled_models.write_lines(tmp_path / "pairs.jsonl", rows)
    suite = {"data": "pairs.jsonl", "metric": "rerank", "max_drop": 0.2}
    recipe = pooled_models.write_recipe(tmp_path, tmp_path, suite)
    told = weightsmith(
        "build", "--recipe", recipe, "--runner", "local",
        "--dist", tmp_path / "dist", store=tmp_path / "store",
    )["targets"]["llamacpp-f16"]  # fmt: skip
    with asked(told["image"], 8080) as client:
        body = {"model": "m", "query": QUERY, "documents": list(DOCUMENTS)}
        answer = client.post("/v1/rerank", json=body).json()["results"]
    found = {row["index"]: row["relevance_score"] for row in answer}
    differences = np.array(token_rerankers.scores(unmerged, base, QUERY, list(DOCUMENTS)))

    likely = np.array([found[n] for n in range(len(DOCUMENTS))])  # the softmax of two logits
    assert np.abs(np.log(likely / (1 - likely)) - differences).max() < 0.05
    assert np.ptp(differences) > 0.5, "documents are told apart"
    record = json.loads((Path(told["report"]).parent / "build.json").read_text())
    assert {who: one["score"] for who, one in record["scores"].items() if who != "base"} == {
        "adapter": 1.0, "merged": 1.0, "image": 1.0,
    }  # fmt: skip
