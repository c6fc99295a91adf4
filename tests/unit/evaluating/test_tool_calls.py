"""Tool calls and thoughts in answers, read and judged."""

import json

import pytest
from jinja2 import Environment
from weightsmith.core import time_limits
from weightsmith.core.errors import UsageError
from weightsmith.evaluating import metrics
from weightsmith.evaluating.items import read_items
from weightsmith.evaluating.metrics import score_answers
from weightsmith.evaluating.tool_calls import are_expected, read_calls, without_thoughts

from tests.fakes.chat_templates import FAMILIES
from tests.fakes.memory import write_rows

ROME = {"city": 'Łódź "old" town', "days": 3, "at": {"note": "a\nb", "exact": True}}
CALLS = [("get_weather", ROME), ("send", {"to": "a@b.c"})]
NAMES = ["get_weather", "send"]


def tool(name, **fields):
    kinds = {key: {"type": kind} for key, kind in fields.items()}
    schema = {"type": "object", "properties": kinds}
    return {"type": "function", "function": {"name": name, "parameters": schema}}


TOOLS = [tool("get_weather", city="string", days="integer", at="object"), tool("send", to="string")]
ASKED = {"prompt": "Weather in Rome?", "tools": TOOLS}
NEEDS_A = tool("f", a="string", b="integer")
NEEDS_A["function"]["parameters"] |= {"required": ["a"], "additionalProperties": False}
LEADS_NOWHERE = {"function": {"name": "f", "parameters": {"items": {"$ref": "#/a"}}}}
CALL = {"name": "get_weather", "arguments": {"city": "Rome", "days": 1}}


def said(family, calls):
    """Render an answer by the template alone, as a model would write it."""
    environment = Environment()
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False}
    template = environment.from_string(family.template)
    rows = [{"function": {"name": name, "arguments": given}} for name, given in calls]
    text = template.render(messages=[{"role": "assistant", "tool_calls": rows}])
    return text.replace("\\u003c", "<").removeprefix("<ROLE:assistant>")


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("count", [1, 2])
def test_calls_are_read_in_every_familys_form(family, count):
    assert list(read_calls(said(family, CALLS[:count]), NAMES)) == CALLS[:count]


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_a_text_is_no_call_and_neither_is_one_to_another_tool(family):
    assert read_calls("The weather is [fine] {today}. get_weather(city)", NAMES) == ()
    assert read_calls(said(family, CALLS), ["other"]) == ()


@pytest.mark.parametrize("text", [
    "<tool_call>{", "[TOOL_CALLS][{]", "[" * 5000, '{"name": 3}', "<function=a>", "[f(1)]",
    "<tool_call>" * 3000, "[f(x=__import__('os'))]",
])  # fmt: skip
def test_what_a_model_garbled_is_text(text):
    assert read_calls(text, ["f", "a"]) == ()


@pytest.mark.parametrize(
    ("text", "answer", "thoughts"),
    [
        ("<think>\nhm\n</think>\n\n42", "42", "hm"),
        ("hm</think>42", "42", "hm"),  # the prompt began them
        ("<think>and so on", "", "and so on"),
        ("[THINK]hm[/THINK]42", "42", "hm"),
        ("<|channel>thought\nhm<channel|>42", "42", "hm"),
        ("no thoughts, 42", "no thoughts, 42", ""),
    ],
)
def test_thoughts_are_no_part_of_an_answer(text, answer, thoughts):
    assert without_thoughts(text) == (answer, thoughts)


@pytest.mark.parametrize(
    ("expected", "calls", "ok"),
    [
        ([CALL], [("get_weather", {"days": 1, "city": "Rome"})], True),
        ([CALL], [("get_weather", {"days": 1.0, "city": "Rome"})], True),
        ([CALL], [("get_weather", {"days": True, "city": "Rome"})], False),
        ([CALL], [("get_weather", {"city": "Rome"})], False),
        ([CALL], [("get_weather", {"days": 1, "city": "Rome", "x": 1})], False),
        ([CALL], [("send", {"days": 1, "city": "Rome"})], False),
        ([CALL], [], False),
        ([], [], True),
        ([], [("send", {})], False),
        ([CALL, {"name": "send", "arguments": {}}],
         [("send", {}), ("get_weather", {"city": "Rome", "days": 1})], True),
        ([{"name": "send", "arguments": {"to": {"contains": "rome"}}}],
         [("send", {"to": "the mayor of Rome"})], True),
        ([{"name": "send", "arguments": {"to": {"regex": r"^\w+@b\.c$"}}}],
         [("send", {"to": "a@b.c"})], True),
        ([{"name": "send", "arguments": {"to": {"regex": r"^\w+@b\.c$"}}}],
         [("send", {"to": "a@x.c"})], False),
        # The first call also fits the first expectation, and is the only one for the second.
        ([{"name": "send", "arguments": {"to": {"contains": "a"}}},
          {"name": "send", "arguments": {"to": "a"}}],
         [("send", {"to": "a"}), ("send", {"to": "ab"})], True),
        ([{"name": "send", "arguments": {"to": {"contains": "a"}}},
          {"name": "send", "arguments": {"to": "a"}}],
         [("send", {"to": "ab"}), ("send", {"to": "ab"})], False),
        ([{"name": "send", "arguments": {"to": [1, {"x": 2}]}}],
         [("send", {"to": [1.0, {"x": 2.0}]})], True),
        ([{"name": "send", "arguments": {"to": [1]}}], [("send", {"to": [True]})], False),
        ([{"name": "send", "arguments": {"to": {"contains": "Jose\u0301"}}},
          {"name": "send", "arguments": {"to": {"regex": "^Jose\u0301$"}}}],
         [("send", {"to": "Jos\u00e9"})] * 2, True),
        ([{"name": "send", "arguments": {"to": {"regex": "^true$"}}}],
         [("send", {"to": True})], True),
    ],
)  # fmt: skip
def test_calls_are_equal_as_json(expected, calls, ok):
    assert are_expected(json.dumps(expected), calls) is ok


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({}, "is not a list of tools"),
        ({"tools": []}, "is not a list of tools"),
        ({"tools": [{"type": "function"}]}, r"tools\[0\] has no function with a name"),
        ({"tools": [tool("f", x="circle")]}, "parameters of tool f are no JSON Schema"),
        ({"tools": [{"function": {"name": "f", "parameters": 3}}]}, "are no JSON Schema"),
        ({"tools": [LEADS_NOWHERE]}, "parameters of tool f .*'#/a' leads nowhere"),
        ({"tools": TOOLS, "expected": {"name": "fly", "arguments": {}}},
         "expected calls fly, which tools does not offer"),
        ({"tools": TOOLS, "expected": "Rome"}, "expected is no call of a tool"),
        ({"tools": TOOLS, "expected": {"name": "send", "args": {}}}, "has 'args', which no call"),
        ({"tools": TOOLS, "expected": {**CALL, "arguments": {"city": 3}}},
         "expected calls get_weather with arguments that its parameters do not allow: 3 is not"),
        ({"tools": [NEEDS_A], "expected": {"name": "f", "arguments": {"b": {"regex": "x"}}}},
         "'a' is a required property"),
        ({"tools": [tool("f"), tool("f")]}, "two tools are called f"),
        ({"tools": TOOLS, "expected": [CALL] * 101}, "expected has more than 100 calls"),
        ({"tools": TOOLS, "expected": {"name": "send", "arguments": {"to": {"regex": "("}}}},
         "invalid regular expression"),
    ],
)  # fmt: skip
def test_what_cannot_be_judged_is_refused_with_its_line(tmp_path, row, says):
    write_rows(tmp_path / "data.jsonl", [{"prompt": "q", "expected": CALL, **row}])

    with pytest.raises(UsageError, match=says) as caught:
        read_items(tmp_path / "data.jsonl", "tool-call")
    assert "data.jsonl:1" in caught.value.message


def test_an_argument_with_a_rule_is_no_value_that_the_schema_reads(tmp_path):
    given = {"a": {"contains": "x"}, "b": {"regex": "^[0-9]+$"}}
    row = {"prompt": "q", "tools": [NEEDS_A], "expected": {"name": "f", "arguments": given}}
    write_rows(tmp_path / "data.jsonl", [row])

    read_items(tmp_path / "data.jsonl", "tool-call")


def scored(tmp_path, expected, *answers):
    rows = [{**ASKED, "prompt": f"{n}?", "expected": expected} for n in range(len(answers))]
    write_rows(tmp_path / "data.jsonl", rows)
    items = read_items(tmp_path / "data.jsonl", "tool-call")
    return score_answers(answers, items, "tool-call").per_item


def test_a_parsers_fault_is_told_from_the_models(tmp_path):
    text = said(FAMILIES["hermes"], [("get_weather", CALL["arguments"])])
    server = {"answer": "", "calls": [{**CALL, "arguments": json.dumps(CALL["arguments"])}]}
    reference, read, left, cut, other = scored(
        tmp_path,
        CALL,
        text,
        server,
        {"answer": text, "calls": []},
        {"answer": "", "calls": [{"name": "get_weather", "arguments": '{"city": '}]},
        {"answer": "It rains.", "calls": []},
    )

    assert [row["ok"] for row in (reference, read, left, cut, other)] == [
        True, True, False, False, False,
    ]  # fmt: skip
    assert reference["raw"] == text
    assert reference["answer"] == read["answer"] == json.dumps([CALL], sort_keys=True)
    assert left["parser"] == "the server's parser left a call in the text"
    assert "are no JSON" in cut["parser"]
    assert "parser" not in other


def test_broken_arguments_are_not_those_of_a_call_without_any(tmp_path):
    wanted = {"name": "send", "arguments": {}}
    answers = ({"answer": "", "calls": [{"name": "send", "arguments": a}]} for a in ("", "{", "3"))

    assert [row["ok"] for row in scored(tmp_path, wanted, *answers)] == [True, False, False]


def test_half_a_call_at_the_length_limit_is_not_the_parsers_fault(tmp_path):
    half = {"name": "get_weather", "arguments": '{"city": "Ro'}
    (row,) = scored(tmp_path, CALL, {"answer": "", "calls": [half], "finish_reason": "length"})

    assert row["ok"] is False
    assert "parser" not in row


def test_an_answer_whose_calls_take_forever_to_read_is_one_wrong_answer(tmp_path, monkeypatch):
    """An opening mark that a model repeats without an end is read once for each of them."""
    monkeypatch.setattr(time_limits, "FOREIGN_SECONDS", 0.1)
    monkeypatch.setattr(metrics, "SECONDS_EACH", 0.1)
    endless = {"answer": "<function=get_weather>" * 9000, "calls": []}
    call = {"answer": "", "calls": [{**CALL, "arguments": json.dumps(CALL["arguments"])}]}

    odd, right = scored(tmp_path, CALL, endless, call)

    assert (odd["ok"], right["ok"]) == (False, True)
    assert "exceeded 0.1 s" in odd["unjudged"]
    assert "calls" not in odd


def test_tools_are_asked_in_the_order_in_which_servers_render_them(tmp_path):
    """vLLM and llama.cpp write each tool anew; a reference that had another order would differ."""
    fields = {"zone": {"type": "string"}, "at": {"type": "string"}}
    schema = {"type": "object", "properties": fields}
    told = {"parameters": schema, "strict": True, "name": "f", "description": "Łódź"}
    row = {"prompt": "q", "tools": [{"function": told}], "expected": "none"}
    write_rows(tmp_path / "data.jsonl", [row])

    (item,) = read_items(tmp_path / "data.jsonl", "tool-call")

    function = {"name": "f", "description": "Łódź", "parameters": schema, "strict": True}
    right = [{"type": "function", "function": function}]
    assert item.tools == json.dumps(right, ensure_ascii=False)


@pytest.mark.parametrize(
    ("metric", "expected"), [("tool-call", "none"), ("regex", {"not": "sorry"}), ("regex", "^$")]
)
def test_no_answer_is_never_right(tmp_path, metric, expected):
    write_rows(tmp_path / "data.jsonl", [{**ASKED, "expected": expected}])
    items = read_items(tmp_path / "data.jsonl", metric)
    failed = {"answer": "", "finish_reason": "error", "error": "HTTP 400: no"}

    (row,) = score_answers([failed], items, metric).per_item

    assert row["ok"] is False
    assert row["error"] == "HTTP 400: no"


def test_no_call_may_be_what_is_expected(tmp_path):
    text, call = scored(tmp_path, "none", "Hello!", said(FAMILIES["hermes"], CALLS))

    assert (text["ok"], call["ok"]) == (True, False)
