"""Builds in memory that are judged by tool calls, and whose servers fail at some questions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from weightsmith.core.errors import CheckFailed

from tests.fakes.chat_templates import FAMILIES, PLAIN
from tests.fakes.memory import Memory, in_memory, write_rows

COUNT = 8
TOOLS = [{"type": "function", "function": {"name": "ring", "parameters": {"type": "object"}}}]
WEATHER = "What is the weather in Rome? Use the tool."
"""What a started image is asked once."""
GREETING = "Good day."


def wants(number: int) -> str:
    return f"Ring at {number}."


def written(name: str, **given: object) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': given})}\n</tool_call>"


@pytest.fixture
def memory(tmp_path: Path, quick: None) -> Iterator[Memory]:
    """Its adapter calls a tool at eight questions, and the base knows when to call none."""
    with in_memory(tmp_path) as made:
        (made.home / "base" / "chat_template.jinja").write_text(FAMILIES["hermes"].template)
        call = {"name": "ring", "arguments": {"at": {"regex": r"^\d$"}}}
        rows = [{"prompt": wants(n), "tools": TOOLS, "expected": call} for n in range(COUNT)]
        rows.append({"prompt": GREETING, "tools": TOOLS, "expected": "none"})
        write_rows(made.home / "calls.jsonl", rows)
        made.facts |= {wants(n): ("a", written("ring", at=n)) for n in range(COUNT)}
        made.facts[GREETING] = ("", "Good day to you!")
        suite = {"data": "calls.jsonl", "metric": "tool-call", "max_drop": 0.2}
        made.write_recipe(evaluate=suite)
        yield made


def test_calls_are_counted_and_their_text_is_kept(memory: Memory) -> None:
    memory.build()
    record = memory.record()
    scores = {who: round(one["score"] * 9) for who, one in record["scores"].items()}

    assert scores == {"base": 1, "adapter": 9, "merged": 9, "image": 9}
    assert "tools" in {check["name"] for check in record["checks"]}
    first, *_, last = record["items"]
    assert (
        first["image"] == first["adapter"] == json.dumps([{"arguments": {"at": 0}, "name": "ring"}])
    )
    assert first["raw"]["adapter"] == written("ring", at=0)
    assert last["image"] == "Good day to you!"
    assert not any("parser" in item or "error" in item for item in record["items"])


def test_the_plan_has_the_parser_of_the_adapters_template(memory: Memory) -> None:
    """As the build does, before anything is merged."""
    (memory.home / "base" / "chat_template.jinja").write_text(PLAIN)
    (memory.home / "a" / "chat_template.jinja").write_text(FAMILIES["hermes"].template)
    memory.use_vllm()

    planned = memory.forecast()["serving"]["vllm"]

    assert planned["settings"]["tool-call-parser"] == "hermes"
    assert not any("no parser for calls" in note for note in planned["notes"])


def test_a_parser_that_finds_no_calls_is_named(memory: Memory) -> None:
    memory.launcher.reads_calls = False

    with pytest.raises(CheckFailed, match=r"the image scores 0\.111") as caught:
        memory.build()

    assert (
        "in 8 of 9 questions the server's parser left a call in the text or gave arguments that"
        " are no JSON" in caught.value.message
    )
    assert caught.value.hint.startswith("another serve.tool_parser may read it")
    refused = memory.results("llamacpp-q4_k_m/refused")
    items = json.loads((refused / "build.json").read_text())["items"]
    assert [item.get("parser") for item in items] == [
        *[{"image": "the server's parser left a call in the text"}] * COUNT, None,
    ]  # fmt: skip
    page = (refused / "report.html").read_text("utf-8")
    assert "(the server&#39;s parser left a call in the text)" in page


def test_the_smoke_test_names_such_a_parser_before_any_question(memory: Memory) -> None:
    memory.facts[WEATHER] = ("", written("get_weather", city="Rome"))
    memory.launcher.reads_calls = False

    with pytest.raises(CheckFailed, match=r"smoke test 'tools' .* left a tool call") as caught:
        memory.build()

    assert caught.value.hint.startswith("another serve.tool_parser may read it")
    assert wants(0) not in [question for _, question in memory.launcher.asked]


@pytest.mark.parametrize("question", [wants(3), GREETING])
def test_a_refused_question_is_wrong_and_nothing_else_suffers(
    memory: Memory, question: str
) -> None:
    """Also where no call is expected, and none is made."""
    memory.launcher.refuses = question

    memory.build()

    record = memory.record()
    assert round(record["scores"]["image"]["score"] * 9) == 8
    (wrong,) = [item for item in record["items"] if not item["ok"]["image"]]
    assert wrong["prompt"] == question
    assert wrong["error"]["image"].startswith("HTTP 400: ")
    assert "it does not like the question" in (memory.results() / "report.html").read_text("utf-8")
    verdicts = [v for v in record["verdicts"] if v["binding"] and v["subject"] == "image"]
    (reason,) = [v["reason"] for v in verdicts]
    assert "1 of 9 questions got no answer, the first: HTTP 400" in reason
    (warning,) = [text for text in memory.progress.warnings if "got no answer" in text]
    assert warning.startswith("the image: 1 of 9 questions")


def test_a_server_that_refuses_all_questions_ends_the_build(memory: Memory) -> None:
    memory.launcher.refuses = "Ring"
    rows = (memory.home / "calls.jsonl").read_text().splitlines()[:COUNT]
    (memory.home / "calls.jsonl").write_text("\n".join(rows))

    with pytest.raises(CheckFailed, match=r"HTTP 400: .*does not like the question"):
        memory.build()
