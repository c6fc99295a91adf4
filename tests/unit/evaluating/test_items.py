import json
import os
from pathlib import Path

import pytest
from weightsmith.core.errors import UsageError
from weightsmith.evaluating.items import Item, read_items, sample


def write(tmp_path, *lines):
    path = tmp_path / "eval.jsonl"
    path.write_bytes(
        b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines)
    )
    return path


def test_reads_prompts_and_messages_in_order(tmp_path):
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Port?"}]
    path = write(
        tmp_path,
        b'\xef\xbb\xbf{"prompt": "Capital of France?", "expected": "Paris"}',
        b"",
        {"messages": chat, "expected": ["7481", "seven"]},
    )

    first, second = read_items(path)

    assert first.messages == ({"role": "user", "content": "Capital of France?"},)
    assert (first.expected, first.line) == (("Paris",), 1)
    assert (second.prompt, second.expected, second.line) == ("Port?", ("7481", "seven"), 3)


def test_questions_come_through_a_pipe(tmp_path):
    path = write(tmp_path, {"prompt": "Capital of France?", "expected": "Paris"})
    reading, writing = os.pipe()
    os.write(writing, path.read_bytes())
    os.close(writing)

    assert read_items(Path(f"/dev/fd/{reading}")) == read_items(path)
    os.close(reading)


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("contains", {"a": 1}),
        ("contains", ["x", {"not": "y"}]),
        ("exact", {"type": "object"}),
        ("numeric", {"not": 5}),
        ("regex", {"not": 5}),
        ("regex", {"not": []}),
        ("regex", {"not": ["a", 5]}),
        ("regex", {"not": "a", "and": "b"}),
        ("regex", {"NOT": "a"}),
    ],
)
def test_an_expected_object_that_the_metric_does_not_know_is_refused(tmp_path, metric, expected):
    """As text it would be looked for to the letter, and never be found."""
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"prompt": "q", "expected": expected}))

    with pytest.raises(UsageError, match=f"data.jsonl:1: .* metric {metric} knows no such object"):
        read_items(path, metric)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"{", "invalid JSON"),
        (b"[" * 100_000, "invalid JSON"),
        (b'{"prompt": "a", "expected": "b", "expected": "c"}', "invalid JSON"),
        (b'{"prompt": "a", "expected": "b", "tools": [NaN]}', "none of JSON"),
        (b'{"prompt": "a", "expected": 1e400}', "none of JSON"),
        (b"[1]", "not a JSON object but a list"),
        (b"\xff\xfe", "not UTF-8"),
        ({"expected": "b"}, "neither prompt nor messages"),
        ({"prompt": "a", "messages": [], "expected": "b"}, "both prompt and messages"),
        ({"prompt": "a"}, "has no expected"),
        ({"prompt": "a", "expected": []}, "empty list"),
        ({"prompt": "a", "expected": 3}, "expected is not a non-empty string"),
        ({"prompt": "  ", "expected": "b"}, "prompt is not a non-empty string"),
        ({"messages": [], "expected": "b"}, "not a list of messages"),
        ({"messages": [{"role": "king", "content": "a"}], "expected": "b"}, "unknown role"),
        ({"messages": [{"role": ["user"], "content": "a"}], "expected": "b"}, "unknown role"),
        (
            {
                "messages": [{"role": "assistant", "content": "a", "tool_calls": [{"id": "1"}]}],
                "expected": "b",
            },
            r"messages\[0\] has tool_calls, and earlier messages",
        ),
        ({"messages": [{"role": "user"}], "expected": "b"}, r"messages\[0\].content"),
        (b'{"prompt": "' + b"a" * (1 << 20) + b'"', "longer than"),
        ({"prompt": "q", "expected": "b"}, "duplicates the question of line 1"),
        ({"prompt": "a", "choices": "xy", "expected": "x"}, "not a list"),
        ({"prompt": "a", "choices": ["x"], "expected": "x"}, "fewer than two"),
        ({"prompt": "a", "choices": ["x", "x"], "expected": "x"}, "duplicates"),
        ({"prompt": "a", "choices": ["x", "y"], "expected": "z"}, "not one of its choices"),
        ({"prompt": "a", "choices": ["x", "y"], "expected": 2}, "not the index of a choice"),
        ({"prompt": "a", "choices": ["x", "y"], "expected": True}, "not a non-empty string"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, line, says):
    path = write(tmp_path, {"prompt": "q", "expected": "a"}, line)

    with pytest.raises(UsageError, match=says) as caught:
        read_items(path)

    assert f"{path}:2" in caught.value.message
    assert caught.value.hint


def test_a_file_without_questions_is_refused(tmp_path):
    with pytest.raises(UsageError, match="has no questions"):
        read_items(write(tmp_path, b"", b"  "))
    with pytest.raises(UsageError, match="cannot read"):
        read_items(tmp_path / "none.jsonl")


def test_reads_choices_and_schemas(tmp_path):
    path = write(
        tmp_path,
        {"prompt": "a", "choices": ["x", "y"], "expected": "y"},
        {"prompt": "b", "choices": ["x", "y"], "expected": 0},
        {"prompt": "c", "expected": {"type": "object"}},
        {"messages": [{"role": "user", "content": "d"}], "choices": ["x", "y"], "expected": ["x"]},
    )

    first, second, third, fourth = read_items(path, "json-schema")

    assert (first.choices, first.expected, first.plain) == (("x", "y"), ("y",), True)
    assert second.expected == ("x",)
    assert third.expected == ('{"type": "object"}',)
    assert not fourth.plain


def asked(*prompts):
    return [
        Item(messages=({"role": "user", "content": text},), expected=("x",), line=n)
        for n, text in enumerate(prompts)
    ]


def test_a_sample_is_chosen_by_content():
    """Whatever the file's order, and a larger one holds a smaller one."""
    items = asked(*(f"question {number}" for number in range(50)))
    chosen = {item.prompt for item in sample(items, 10)}

    assert len(chosen) == 10
    assert {item.prompt for item in sample(items[::-1], 10)} == chosen
    assert chosen < {item.prompt for item in sample(items, 11)}
    assert chosen != {item.prompt for item in items[:10]}
    lines = [item.line for item in sample(items, 10)]
    assert lines == sorted(lines)
    assert [len(sample(items, limit)) for limit in (0, 50, 99)] == [50] * 3
