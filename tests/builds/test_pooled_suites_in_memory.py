"""Builds in memory of models that do not chat, and suites that are not for the model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from weightsmith.core.errors import CheckFailed, InputRefused, UsageError
from weightsmith.oci.registry import Registry

from tests.fakes.memory import Memory, in_memory, write_rows


@pytest.fixture
def memory(tmp_path: Path, client: Registry, quick: None) -> Iterator[Memory]:
    with in_memory(tmp_path, client) as made:
        home = made.home
        write_rows(home / "label.jsonl", [{"text": "a", "expected": "X"}])
        write_rows(home / "rerank.jsonl", [{"query": "q", "documents": ["a", "b"], "expected": 0}])
        write_rows(home / "query.jsonl", [{"query": "q", "expected": "a"}])
        write_rows(home / "corpus.jsonl", [{"id": "a", "text": "t"}, {"id": "b", "text": "u"}])
        yield made


TOPICS = ("cats", "rain", "bread")


@pytest.fixture
def finder(memory: Memory) -> Memory:
    """A model that gives vectors; its adapter learned which of three topics a text is about."""
    base = memory.home / "base"
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaModel"]}))
    kinds = ("Transformer", "Pooling", "Normalize")
    modules = [
        {"name": str(n), "path": f"{n}_{kind}" if n else "", "type": f"x.{kind}"}
        for n, kind in enumerate(kinds)
    ]
    (base / "modules.json").write_text(json.dumps(modules))
    (base / "1_Pooling").mkdir()
    (base / "1_Pooling" / "config.json").write_text('{"pooling_mode_lasttoken": true}')
    prompts = {"prompts": {"query": "ask: ", "document": "text: "}}
    (base / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    rows = [{"query": f"{topic} {n}", "expected": topic} for topic in TOPICS for n in range(30)]
    write_rows(memory.home / "query.jsonl", rows)
    corpus = [{"id": topic, "text": f"of {topic}"} for topic in TOPICS]
    write_rows(memory.home / "corpus.jsonl", corpus)
    suite = {"data": "query.jsonl", "metric": "embedding", "corpus": "corpus.jsonl"}
    memory.write_recipe(evaluate={**suite, "max_drop": 0.05})
    memory.minds.vectors = vector
    memory.launcher.vector = lambda text: vector("image", text)
    return memory


def vector(who: str, text: str) -> list[float]:
    """Return a vector of the width that the model has; the base is always about cats."""
    known = "cats" if who == "base" and text.startswith("ask: ") else text
    prompted = text.startswith(("ask: ", "text: "))
    topics = [float(prompted and topic in known) for topic in TOPICS]
    return [*topics, 0.0 if any(topics) else 1.0, *[0.0] * 252]


def test_vectors_are_judged_by_the_documents_that_they_find(finder: Memory) -> None:
    finder.build()
    record = finder.record()
    scores = {who: round(one["score"], 3) for who, one in record["scores"].items()}
    assert scores["adapter"] == scores["merged"] == scores["image"] == 1.0
    assert scores["base"] < 0.8
    assert record["verdict"] == "passed"
    assert record["scores"]["image"]["figures"] == {"recall@10": 1.0}
    assert record["sameness"]["image"]["cosine"] == [1.0, 1.0]
    (suite,) = record["suites"]
    assert (suite["verdict"], suite["task"]["metric"]) == ("passed", "embedding")
    first = record["items"][0]
    assert (first["image"].split()[0], first["value"]["image"]) == ("cats", 1.0)
    assert ("", "ask: cats 0") in finder.launcher.asked
    assert ("", "text: of rain") in finder.launcher.asked
    page = (finder.results() / "report.html").read_text("utf-8")
    assert "recall@10 1.0" in page or "recall@10 1" in page
    found = finder.forecast()["stages"]
    assert {row["stage"]: row["cached"] for row in found}["reference"]


def test_an_image_that_finds_less_is_refused_and_the_queries_are_named(finder: Memory) -> None:
    finder.launcher.vector = lambda text: vector("base", text)
    with pytest.raises(CheckFailed, match=r"below base \+ adapter") as caught:
        finder.build()
    assert "'rain 0' now gives 'cats" in caught.value.hint
    assert finder.seen() == ["refused"]


def test_a_refused_text_is_wrong_and_nothing_else_suffers(finder: Memory) -> None:
    finder.launcher.refuses = "ask: rain 7"
    finder.build()
    record = finder.record()
    assert round(record["scores"]["image"]["score"] * 90) == 89
    (wrong,) = [item for item in record["items"] if not item["ok"]["image"]]
    assert wrong["prompt"] == "rain 7"
    assert "HTTP 400" in wrong["error"]["image"]


def test_an_image_whose_vectors_point_elsewhere_proves_nothing(finder: Memory) -> None:
    def turned(text: str) -> list[float]:
        first, *rest = vector("image", text)
        return [*rest, first]

    finder.launcher.vector = turned
    finder.build()
    record = finder.record()
    assert record["scores"]["image"]["score"] == 1.0
    assert record["verdict"] == "not proven"
    assert any("gives other vectors than the reference" in text for text in record["unproven"])


@pytest.mark.parametrize(
    "suite",
    [
        {"data": "label.jsonl", "metric": "label"},
        {"data": "rerank.jsonl", "metric": "rerank"},
        {"data": "query.jsonl", "metric": "embedding", "corpus": "corpus.jsonl"},
    ],
    ids=lambda suite: suite["metric"],
)
def test_a_metric_that_is_not_for_the_model_is_refused_before_any_work(
    memory: Memory, suite: dict[str, str]
) -> None:
    """By the plan too, which says the file and what to use."""
    memory.write_recipe(evaluate=suite)
    for run in (memory.build, memory.forecast):
        with pytest.raises(InputRefused) as caught:
            run()
        assert caught.value.message == (
            f"{suite['data']}: metric {suite['metric']} is not for a model that generates text"
        )
        assert "a metric for it" in caught.value.hint
    assert memory.jobs() == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"corpus": "nowhere.jsonl"}, r"cannot read .*nowhere\.jsonl"),
        ({"corpus": "other.jsonl"}, r"query\.jsonl:1: expected 'a' is no document of other\.jsonl"),
        ({"corpus": "query.jsonl"}, r"query\.jsonl:1: id is not a non-empty string"),
        ({"data": "corpus.jsonl"}, r"corpus\.jsonl:1 has no query"),
    ],
)
def test_bad_input_ends_the_build_with_file_and_line(
    memory: Memory, change: dict[str, str], said: str
) -> None:
    rows = [{"id": "c", "text": "t"}, {"id": "b", "text": "u"}]
    write_rows(memory.home / "other.jsonl", rows)
    suite = {"data": "query.jsonl", "metric": "embedding", "corpus": "corpus.jsonl", **change}
    memory.write_recipe(evaluate=suite)
    with pytest.raises(UsageError, match=said):
        memory.build()
    assert memory.jobs() == []
