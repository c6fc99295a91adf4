"""From an adapter to a started image of vLLM on a CPU, for models that do not chat."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoTokenizer, BertForPreTraining
from weightsmith.building.wiring import cache_folder
from weightsmith.merging.engine import MergeRequest, merge

from tests import vllm_parts
from tests.fakes import encoders, pooled_models, token_rerankers
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


def test_a_reranker_by_two_tokens_scores_as_base_and_adapter(tmp_path: Path) -> None:
    """By a head that vLLM makes of two tokens, and the model's own words around a pair."""
    base, query, *documents = tmp_path / "base", *TEXTS
    token_rerankers.written(base)
    unmerged = token_rerankers.adapted(base, tmp_path / "adapter")
    expected = np.array(token_rerankers.scores(unmerged, base, query, documents))

    weightsmith(
        "build", "--base", base, "--adapter", tmp_path / "adapter", "--target", "vllm",
        "--runner", "local", "--dist", tmp_path / "dist", "--set", "name=m",
        "--layout", tmp_path / "image",
    )  # fmt: skip
    with started_image(tmp_path / "image") as client:
        body = {"model": "m", "query": query, "documents": documents}
        rows = client.post("/v1/rerank", json=body).raise_for_status().json()["results"]
    found = {row["index"]: row["relevance_score"] for row in rows}
    likely = np.array([found[n] for n in range(len(documents))])

    assert np.abs(np.log(likely / (1 - likely)) - expected).max() < 0.1
    assert np.ptp(expected) > 0.5, "documents are told apart"


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """vLLM's packages in one process: an image of them would be packed and started per model."""
    root = tmp_path_factory.mktemp("engine")
    with vllm_parts.answering(Path(__file__).with_name("vllm_answers.py"), root) as ask:
        yield ask


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS"])
@pytest.mark.parametrize("family", ["bert", "gaps", "roberta", "xlm_roberta"])
def test_a_head_below_which_the_encoder_was_renamed(
    engine: Callable[..., Any], tmp_path: Path, family: str, task: str
) -> None:
    """vLLM's numbers are those of the unmerged model, also where the base had another head."""
    base = getattr(encoders, family.replace("gaps", "bert"))(tmp_path / "base")
    if family == "gaps":
        BertForPreTraining.from_pretrained(base).save_pretrained(base)
    unmerged = adapted(base, tmp_path / "adapter", task, num_labels=3)
    out = tmp_path / "merged"
    merge(MergeRequest(base=base, adapters=((tmp_path / "adapter", 1.0),), out=out))

    found = engine({"model": str(out), "texts": list(TEXTS), "tokens": task == "TOKEN_CLS"})

    assert isinstance(found, list), found
    tokenizer = AutoTokenizer.from_pretrained(base)
    for text, probabilities in zip(TEXTS, found, strict=True):
        with torch.no_grad():
            logits = unmerged(**tokenizer(text, return_tensors="pt")).logits[0]
        torch.testing.assert_close(
            torch.tensor(probabilities), logits.softmax(-1), atol=1e-4, rtol=0
        )


SUITES: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "rerank": ("rerank", pooled_models.candidates(60)),
    "label-set": ("label", pooled_models.labelled_sets(60)),
    "token-classify": ("label", pooled_models.worded(60)),
}
"""Kind of a model -> its metric, and what is asked."""


@pytest.mark.parametrize("kind", SUITES)
def test_the_image_is_judged_by_its_suite(tmp_path: Path, kind: str) -> None:
    """The base is a plain BertModel; the adapter brings the head."""
    trained = pooled_models.made(kind, cache_folder() / "trained")
    metric, rows = SUITES[kind]
    pooled_models.write_lines(tmp_path / "rows.jsonl", rows)
    recipe = {
        "name": "m", "base": {"source": str(trained / "base")},
        "adapters": [{"source": str(trained / "adapter")}],
        "evaluate": {"data": "rows.jsonl", "metric": metric, "max_drop": 0.05},
        "targets": ["vllm"],
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    told = weightsmith(
        "build", "--recipe", tmp_path / "recipe.yaml", "--runner", "local",
        "--dist", tmp_path / "dist",
    )["targets"]["vllm"]  # fmt: skip

    record = json.loads((Path(told["report"]).parent / "build.json").read_text())
    scores = {who: one["score"] for who, one in record["scores"].items()}
    assert record["verdict"] == "passed"
    assert scores["adapter"] > 0.9
    assert scores["merged"] == scores["adapter"]
    assert scores["image"] == pytest.approx(scores["adapter"], abs=0.02)
    assert kind.replace("label-set", "classify") in {one["name"] for one in record["checks"]}
