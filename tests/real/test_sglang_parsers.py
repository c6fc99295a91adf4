"""SGLang's own parsers read back the calls and thoughts of the families that the table names.

Needs SGLang's code and four packages that it imports, in a folder that WEIGHTSMITH_SGLANG names:
`pip install --no-deps --target FOLDER sglang==0.5.23 orjson triton ipython traitlets`. The others
are those of vLLM's engine for CPUs; no GPU is needed.
"""

import os
from collections.abc import Iterator
from typing import Any

import pytest
from weightsmith.evaluating.round_trip import TOOLS
from weightsmith.serving.parsers import THOUGHTS
from weightsmith.serving.sglang import known_options

from tests import vllm_parts
from tests.fakes.chat_templates import FAMILIES
from tests.paths import ROOT, TINY
from tests.real.test_parsers import ASKED, ONE_AT_A_TIME, chat

FOLDER = os.environ.get("WEIGHTSMITH_SGLANG", "")
pytestmark = [
    pytest.mark.real,
    pytest.mark.vllm,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not FOLDER, reason="no SGLang: set WEIGHTSMITH_SGLANG to its folder"),
]

HARMONY = "gpt-oss' template words an earlier call otherwise than the model writes a new one"
FLAWED = {"mistral-small": "of two calls that come in pieces, the second is lost"}
"""Families that SGLang 0.5.23 reads rightly as a whole, and wrongly in a stream."""
THOUGHT, ANSWER = "First I look at the map.", "Take the second bridge"
MARKS = {
    "mistral": ("[THINK]", "[/THINK]"),
    "gemma4": ("<|channel>thought\n", "<channel|>"),
    "gpt-oss": (
        "<|channel|>analysis<|message|>",
        "<|end|><|start|>assistant<|channel|>final<|message|>",
    ),
}
"""Around the thoughts of a parser; else <think>."""
_BEGINS = "{{ '<|im_start|>assistant\\n<think>\\n' }}"
OPENING = {
    "Qwen3-Thinking": (_BEGINS, "qwen3"),
    "Qwen3.5": (_BEGINS + "{% if enable_thinking is defined and not enable_thinking %}", "qwen3"),
    "DeepSeek-R1": ("{{ '<Assistant><think>\\n' }} </think>", "deepseek-r1"),
    "OLMo 3": (_BEGINS, "deepseek-r1"),
}
"""Templates whose prompt opens thoughts, in the words that SGLang looks for."""


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    program = ROOT / "tests" / "fakes" / "sglang_parsers.py"
    with vllm_parts.answering(program, tmp_path_factory.mktemp("sglang"), FOLDER) as asked:
        yield asked


@pytest.mark.parametrize("name", FAMILIES)
def test_the_tables_parser_reads_what_the_template_renders(ask: Any, name: str) -> None:
    """Whole and in pieces; where the table has none, none of SGLang's reads it."""
    family = FAMILIES[name]
    if family.sglang == "gpt-oss":
        pytest.skip(HARMONY)
    parsers = [family.sglang] if family.sglang else known_options().words["tool-call-parser"]
    asked = [calls for calls in ASKED if len(calls) < 2 or family.vllm not in ONE_AT_A_TIME]
    told = ask(
        {
            "template": family.template,
            "marks": family.marks,
            "parsers": list(parsers),
            "chats": [chat(calls) for calls in asked],
            "tools": TOOLS,
            "tokenizer": str(TINY / "base"),
        }
    )
    for rows in told.values():
        for calls, row in zip(asked, rows, strict=True):
            expected = [[name, arguments] for name, arguments in calls]
            if family.sglang:
                assert row["whole"] == expected, row
                lost = name in FLAWED and len(calls) > 1
                assert row["streamed"] == expected[: 1 if lost else None], row
            elif calls:
                assert expected not in (row["whole"], row["streamed"]), row


@pytest.mark.parametrize("parser", sorted({one.sglang for one in THOUGHTS if one.sglang}))
def test_the_tables_parser_reads_thoughts_in_their_marks(ask: Any, parser: str) -> None:
    begin, end = MARKS.get(parser, ("<think>\n", "\n</think>\n\n"))
    assert read(ask, parser, f"{begin}{THOUGHT}{end}{ANSWER}", [begin.strip(), end.strip()]) == {
        "whole": [THOUGHT, ANSWER],
        "streamed": [THOUGHT, ANSWER],
    }


@pytest.mark.parametrize(("template", "parser"), OPENING.values(), ids=OPENING)
def test_thoughts_that_the_prompt_opens_are_read(ask: Any, template: str, parser: str) -> None:
    text = f"{THOUGHT}\n</think>\n\n{ANSWER}"
    assert read(ask, parser, text, ["<think>", "</think>"], template) == {
        "whole": [THOUGHT, ANSWER],
        "streamed": [THOUGHT, ANSWER],
    }


def read(ask: Any, parser: str, text: str, marks: list[str], template: str = "") -> Any:
    told = ask({"thoughts": parser, "texts": [text], "marks": marks, "template": template})
    return told[0]
