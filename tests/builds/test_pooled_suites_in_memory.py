"""Builds in memory of models that do not chat, and suites that are not for the model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from weightsmith.core.errors import InputRefused, UsageError
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
