"""What cannot be seen is spelled out, and everything else stays as it is."""

from __future__ import annotations

import json

import pytest
from weightsmith.core.escape import as_json, escaped, joined, passed_on, printed, quoted, upright


@pytest.mark.parametrize("text", ["", "Größe 模型 اختبار 🙂 a\\b {c} [d]", "  two  spaces"])
def test_what_can_be_seen_stays(text: str) -> None:
    assert escaped(text) == quoted(text) == printed(text) == upright(text) == text


@pytest.mark.parametrize(
    ("text", "spelled"),
    [
        ("a\x1b[2J", r"a\x1b[2J"),
        ("a\nb\r\tc", r"a\nb\r\tc"),
        ("a\x7f\x9b\xa0", r"a\x7f\x9b\xa0"),
        ("a\u202e\u2066\u200b\ufeff\u2029", r"a\u202e\u2066\u200b\ufeff\u2029"),
        ("a\U000e0041\ud800\u3164", r"a\U000e0041\ud800\u3164"),
    ],
)
def test_what_cannot_be_seen_is_spelled_out(text: str, spelled: str) -> None:
    assert escaped(text) == spelled
    assert joined(["x", text]) == f"x\n{spelled}"


def test_further_lines_of_a_message_are_marked_and_those_of_printed_text_stay() -> None:
    said = quoted("it ended:\r\n  a log\n\nlast\x07")
    assert said == "it ended:\n  |   a log\n  | \n  | last\\x07"
    assert printed("a\tb\n\x1bc\n") == "a\tb\n\\x1bc\n"
    assert passed_on("\x1b[31;1mred\x1b[0m \x1b[2J") == r"red \x1b[2J"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("::error::x", r"\x3a:error::x"),
        ("a\n \t::set-output x", "a\n \t\\x3a:set-output x"),
        ("see ##vso[task] and ##[group]", r"see #\x23vso[task] and #\x23[group]"),
        ("a::b ## c", "a::b ## c"),
    ],
)
def test_no_line_is_a_command_to_ci(text: str, said: str) -> None:
    assert printed(text) == said


def test_json_keeps_its_values_and_has_null_for_what_is_no_number() -> None:
    value = {"##vso[a]": ["\x7f\x1b", "####[", "é"]}
    assert json.loads(as_json(value)) == value
    assert "##" not in as_json(value)
    odd = {"a": [float("nan"), {"b": float("-inf")}, 1.5], "c": "NaN"}
    plain = {"a": [None, {"b": None}, 1.5], "c": "NaN"}
    assert json.loads(as_json(odd), parse_constant=pytest.fail) == plain


def test_a_page_keeps_what_languages_need() -> None:
    text = "می‌خواهم 👩‍👩‍👧 שלום\u200f\n\tx"
    assert upright(text) == text
    assert upright("a\u202eb\u2066\x1b\x85\u2028") == r"a\u202eb\u2066\x1b\x85\u2028"
