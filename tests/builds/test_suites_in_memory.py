"""Builds in memory with several suites: what each is held against, and where what is said lands."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from weightsmith.cli.commands import _facts, _lines
from weightsmith.core import time_limits
from weightsmith.core.errors import CheckFailed, EnvironmentFailure, UsageError
from weightsmith.evaluating import metrics
from weightsmith.evaluating.pages import write_comparison
from weightsmith.oci.references import Reference

from tests.fakes.fleet import run, write_fleet
from tests.fakes.memory import Memory, in_memory, write_rows

TARGET = "llamacpp-q4_k_m"
TASK = {"name": "task", "data": "a.jsonl", "max_drop": 0.25}
GENERAL = {"name": "general", "data": "general.jsonl", "against": "base", "max_drop": 0.2}
COUNT = 40


def general(number: int) -> str:
    return f"General question {number}?"


@pytest.fixture
def memory(tmp_path: Path, quick: None) -> Iterator[Memory]:
    """Its base knows 40 general answers, and its adapter eight more of its own."""
    with in_memory(tmp_path) as made:
        rows = [{"prompt": general(n), "expected": f"fact {n}"} for n in range(COUNT)]
        write_rows(made.home / "general.jsonl", rows)
        made.facts |= {general(n): ("", f"fact {n}") for n in range(COUNT)}
        made.write_recipe(evaluate=[TASK, GENERAL])
        yield made


def forget(memory: Memory, count: int, *who: str) -> None:
    for one in who:
        memory.minds.forgot[one] = {general(n) for n in range(count)}


def test_each_suite_has_its_scores_its_verdict_and_its_place_in_all_that_is_said(
    memory: Memory,
) -> None:
    (built,) = memory.build(push=True).values()
    record = memory.record()

    task, kept = record["suites"]
    assert [task["name"], kept["name"]] == ["task", "general"]
    assert [task["scores"][who]["score"] for who in ("base", "adapter", "image")] == [0, 1, 1]
    assert {score["score"] for score in kept["scores"].values()} == {1}
    assert (kept["task"]["against"], kept["task"]["max_drop"]) == ("base", 0.2)
    assert [v["against"] for v in kept["verdicts"] if v["binding"]] == ["base", "base"]
    # Eight questions show nothing about a drop of 0.25, and forty all about one of 0.2.
    assert [task["verdict"], kept["verdict"], record["verdict"]] == [
        "not proven", "passed", "not proven",
    ]  # fmt: skip
    assert record["scores"] == task["scores"]
    assert [item["suite"] for item in record["items"]] == ["task"] * 8 + ["general"] * COUNT

    page = (memory.results() / "report.html").read_text("utf-8")
    assert "at most 0.2 below the base" in page
    suites = ET.parse(memory.results() / "junit.xml").getroot().findall("testsuite")
    assert [(one.get("name"), one.get("tests")) for one in suites[1:]] == [
        ("questions task", "8"), ("questions general", "40"),
    ]  # fmt: skip
    compared = write_comparison(memory.results(), memory.results(), memory.folder / "compared")
    assert "score of the image, general" in compared.markdown.read_text("utf-8")
    assert "general: passed" in compared.html.read_text("utf-8")
    image = memory.client.pull(Reference.parse(f"{memory.repository}:1.0.0-{TARGET}"))
    (said,) = (text for key, text in image.labels.items() if key.endswith(".suites"))
    assert [one["verdict"] for one in json.loads(said)] == ["not proven", "passed"]
    facts: Any = _facts(built)
    assert [one["verdict"] for one in facts["suites"]] == ["not proven", "passed"]
    assert "  general: base 1.000, adapter 1.000, merged 1.000, image 1.000: passed" in list(
        _lines(built)
    )


def test_an_adapter_that_forgot_stops_the_build_before_quantizing(memory: Memory) -> None:
    forget(memory, 12, "adapter", "merged", "image")

    with pytest.raises(CheckFailed, match="general: the merged model") as caught:
        memory.build()

    assert "the adapter itself lost 12 of 40, merging lost none" in caught.value.message
    assert "mix general examples into the training" in caught.value.hint
    assert "quantize" not in memory.jobs()
    refused = memory.dist / "tiny" / "1.0.0" / "refused" / "build.json"
    assert [s["verdict"] for s in json.loads(refused.read_text())["suites"]] == [
        "not proven", "failed",
    ]  # fmt: skip


def test_an_adapter_may_know_more_than_the_base(memory: Memory) -> None:
    forget(memory, 30, "base")
    memory.build()
    assert memory.record()["suites"][1]["verdict"] == "passed"


def test_a_pattern_that_never_ends_on_an_answer_costs_one_question(
    memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the build goes on; report and verdict say which question it was, and why."""
    monkeypatch.setattr(time_limits, "FOREIGN_SECONDS", 0.4)
    monkeypatch.setattr(metrics, "SECONDS_EACH", 0.1)
    rows = [{"prompt": general(n), "expected": f"fact {n}"} for n in range(1, COUNT)]
    endless = general(0)
    write_rows(memory.home / "general.jsonl", [{"prompt": endless, "expected": "(a+)+$"}, *rows])
    memory.facts[endless] = ("", "a" * 60 + "!")
    memory.write_recipe(evaluate=[TASK, {**GENERAL, "metric": "regex"}])

    memory.build()
    record = memory.record()

    kept = record["suites"][1]
    assert {score["score"] for score in kept["scores"].values()} == {(COUNT - 1) / COUNT}
    (row,) = (item for item in record["items"] if item["prompt"] == endless)
    assert row["unjudged"]["image"].startswith("line 1: metric regex exceeded")
    assert any("1 of 40 questions count as wrong" in v["reason"] for v in kept["verdicts"])
    assert "not judged: line 1" in (memory.results() / "report.html").read_text("utf-8")


def test_junit_says_of_a_suite_that_passed_that_its_lost_answers_are_allowed(
    memory: Memory,
) -> None:
    """Also where another suite stopped the build."""
    forget(memory, 12, "image")
    memory.minds.forgot["image"] |= {"What does a say to 3?"}

    with pytest.raises(CheckFailed, match="general: the image"):
        memory.build()
    root = ET.parse(next(memory.dist.rglob("junit.xml"))).getroot()

    _, task, kept = root.findall("testsuite")
    assert [(one.get("failures"), one.get("skipped")) for one in (task, kept)] == [
        ("0", "1"), ("12", "0"),
    ]  # fmt: skip


def test_what_quantizing_forgot_is_not_the_adapters_fault(memory: Memory) -> None:
    forget(memory, 12, "image")

    with pytest.raises(CheckFailed) as caught:
        memory.build()

    assert (
        "the adapter itself lost none, merging lost none, quantizing and serving lost 12 of 40"
        in caught.value.message
    )
    assert "training" not in caught.value.hint


def test_the_adapters_suite_is_held_against_the_adapter_whatever_the_base_could(
    memory: Memory,
) -> None:
    memory.write_recipe(evaluate={**GENERAL, "against": "adapter"})
    forget(memory, 12, "adapter", "merged", "image")

    (built,) = memory.build().values()

    assert built.verdict == "not proven"  # the base alone would pass
    assert "base alone" in built.unproven[0]


@pytest.mark.parametrize(("lost", "passes"), [(4, True), (5, False)])
def test_a_minimum_score_alone_is_a_bar_that_no_other_model_sets(
    memory: Memory, *, lost: int, passes: bool
) -> None:
    memory.write_recipe(evaluate=[TASK, {"data": "general.jsonl", "min_score": 0.9}])
    forget(memory, lost, "base", "adapter", "merged", "image")

    if not passes:
        with pytest.raises(CheckFailed, match=r"general: .* below the minimum score of 0\.9"):
            memory.build()
        assert "quantize" not in memory.jobs()
        return
    memory.build()
    (reason,) = memory.record()["suites"][1]["unproven"]
    assert "40 questions do not show a score of at least 0.9" in reason
    assert reason.endswith("at least 0.769")  # Wilson's interval of 36 of 40


def test_all_suites_are_asked_in_one_walk(memory: Memory) -> None:
    memory.build()
    asking = [job for job in memory.runner.jobs if job.kind in {"proof", "reference"}]
    jobs: list[Any] = [getattr(job, "reference", job) for job in asking]

    assert [len(job.walks) for job in jobs] == [1]
    (walk,) = jobs[0].walks
    assert [len(task.questions) for task in walk.tasks] == [8, COUNT]


@pytest.mark.slow
def test_a_fleet_takes_suites_and_an_adapters_own_go_on_top_by_name(
    memory: Memory, at_once: None
) -> None:
    own = {"source": "./a", "evaluate": [{"name": "task", "max_drop": 0.5}]}
    memory.write_recipe(evaluate=[TASK, GENERAL], adapters=[])
    rows, _ = run(memory, write_fleet(memory, adapters=[own], targets=[TARGET]))

    (cell,) = rows.cells
    assert [(suite.name, suite.verdict, suite.score) for suite in cell.suites] == [
        ("task", "passed", 1), ("general", "passed", 1),
    ]  # fmt: skip
    assert "general: passed, 1.000" in (memory.dist / "fleet.html").read_text("utf-8")


def test_dequantized_weights_are_asked_all_suites_in_one_job(memory: Memory) -> None:
    serve = {"max_model_len": 256, "max_num_seqs": 2, "gpu": "nvidia-h100-80gb"}
    memory.use_vllm("vllm-fp8", serve=serve, evaluate=[TASK, GENERAL])
    memory.build()

    assert memory.jobs().count("dequantized") == 1
    assert [set(suite["scores"]) for suite in memory.record("vllm-fp8")["suites"]] == [
        {"base", "adapter", "merged", "dequantized"}
    ] * 2
    memory.build()
    assert memory.jobs() == []


@pytest.mark.parametrize(
    ("evaluate", "says"),
    [
        ([TASK, {**GENERAL, "name": "task"}], "two suites of `evaluate` are called task"),
        ([TASK, {**GENERAL, "name": "Task"}], "called task and Task, which differ in case alone"),
        ([TASK, {"name": "x"}], r"`evaluate.1.data` is missing"),
        ([TASK, {**GENERAL, "metric": "vibes"}], "evaluate.1.metric"),
        ([TASK, {**GENERAL, "against": "nobody"}], "evaluate.1.against"),
        ([TASK, {**GENERAL, "name": "../x"}], "evaluate.1.name"),
        ([TASK, {**GENERAL, "data": "nowhere.jsonl"}], "nowhere.jsonl"),
        ([TASK, {**GENERAL, "metric": "numeric"}], r"general\.jsonl:1: .* is not a number"),
        ([TASK, {**GENERAL, "metric": "numeric", "tolerance": "-1"}], "evaluate.1.tolerance"),
    ],
)
def test_what_is_wrong_with_a_suite_is_said_before_any_work(
    memory: Memory, evaluate: object, says: str
) -> None:
    memory.write_recipe(evaluate=evaluate)

    with pytest.raises(UsageError, match=says):
        memory.build()

    assert memory.jobs() == []


def test_a_judge_that_is_not_here_is_said_before_any_work(memory: Memory) -> None:
    memory.write_recipe(evaluate={**TASK, "metric": "command", "command": ["no-such-judge"]})

    for act in (memory.forecast, memory.build):
        with pytest.raises(EnvironmentFailure, match="'no-such-judge', which judges the answers"):
            act()
    assert memory.jobs() == []
