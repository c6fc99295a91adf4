"""vLLM's own parsers read back the calls that each family's template renders."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests import vllm_parts
from tests.fakes.chat_templates import FAMILIES
from tests.paths import ROOT, TINY

pytestmark = [pytest.mark.real, pytest.mark.vllm, pytest.mark.timeout(1800)]

WEATHER = {
    "city": 'Łódź "old" town',
    "days": 3,
    "units": ["C", "%"],
    "at": {"hour": 7, "note": "first\nsecond", "exact": True},
}
PLAIN = {"city": "Rome", "days": 1}
CALLS = [[("get_weather", WEATHER)], [("get_weather", PLAIN), ("send", {"to": "a@b.c"})], []]
_TEXT = {"type": "string"}
_AT = {"hour": {"type": "integer"}, "note": _TEXT, "exact": {"type": "boolean"}}
_FIELDS = {
    "get_weather": {
        "city": _TEXT,
        "days": {"type": "integer"},
        "units": {"type": "array", "items": _TEXT},
        # Without these, Gemma 4's parser reads a number within it as text.
        "at": {"type": "object", "properties": _AT},
    },
    "send": {"to": _TEXT},
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": name,
            "parameters": {"type": "object", "properties": fields},
        },
    }
    for name, fields in _FIELDS.items()
]
ONE_AT_A_TIME = {"llama3_json"}
"""Llama 3's template refuses a message with several calls."""
FLAWED = {
    "deepseek_v3": "of a call that comes token by token, nothing is sent",
    "deepseek_v31": "of a call that comes token by token, nothing is sent",
}
"""vLLM 0.32's parsers that read a stream wrongly, and a whole answer rightly."""
OWN_LOOP = {"openai": "gpt-oss' calls are read from token ids by openai_harmony, in the server"}


def chat(calls: Any) -> list[dict[str, Any]]:
    made = [{"type": "function", "function": {"name": n, "arguments": a}} for n, a in calls]
    said = {"role": "assistant", "content": "" if calls else "It rains.", "tool_calls": made}
    return [{"role": "user", "content": "?"}, said]


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    program = ROOT / "tests" / "fakes" / "vllm_parsers.py"
    with vllm_parts.answering(program, tmp_path_factory.mktemp("vllm")) as asked:
        yield asked


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_what_the_template_renders_is_read_back(ask: Any, family: Any) -> None:
    if family.vllm in OWN_LOOP:
        pytest.skip(OWN_LOOP[family.vllm])
    asked = [calls for calls in CALLS if len(calls) < 2 or family.vllm not in ONE_AT_A_TIME]
    told = ask(
        {
            "template": family.template,
            "marks": family.marks,
            "parser": family.vllm,
            "chats": [chat(calls) for calls in asked],
            "tools": TOOLS,
            "tokenizer": str(TINY / "base"),
        }
    )
    for calls, row in zip(asked, told, strict=True):
        expected = [[name, arguments] for name, arguments in calls]
        assert row["whole"] == expected, row
        flawed = calls and family.vllm in FLAWED
        assert row["streamed"] == ([] if flawed else expected), row
