"""How much untrusted JSON is read."""

from __future__ import annotations

import json
import tracemalloc

import pytest
from weightsmith import foreign
from weightsmith.foreign import parse

TRICKY = ["a, b", "[{,", 'say "no, no"', "back\\", '\\", ', "\u2028,\n"]


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreign, "MOST_VALUES", 8)


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("said", TRICKY)
def test_commas_in_texts_are_no_values(said: str) -> None:
    """Answers of 100,000 questions have millions of them."""
    rows = [said * 9, {"key, of": said}]

    assert parse(json.dumps(rows)) == rows
    assert parse(json.dumps(rows, ensure_ascii=False)) == rows
    with pytest.raises(ValueError, match="more than 8 values"):
        parse(json.dumps([said, *range(9)]))


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("end", ["", "\\", "x", '\\"'])
def test_a_string_without_an_end_is_refused_soon(end: str) -> None:
    with pytest.raises(ValueError, match=r"Unterminated|escape|delimiter|Expecting"):
        parse('["' + '\\",' * 300_000 + end)


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("one", ['""', '"\\\\"', '{"":""}'])
def test_many_strings_are_refused_without_memory_for_each(one: str) -> None:
    """Ten times the text, if each were cut out."""
    text = "[" + ",".join([one] * 300_000) + "]"

    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="more than 8 values"):
            parse(text)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert peak < len(text)


@pytest.mark.usefixtures("few")
def test_texts_of_as_many_values_as_allowed_are_read() -> None:
    """Each with a key and a text of nothing but quotes."""
    rows = {f'"\\"{n}': '"\\' * 50 + "," for n in range(8)}
    assert parse(json.dumps(rows)) == rows
