"""How much untrusted JSON is read."""

from __future__ import annotations

import json
import os
import tracemalloc
from pathlib import Path

import pytest
from weightsmith.core import safe_parse as foreign
from weightsmith.core.safe_parse import content, given_content, parse, parse_yaml

TRICKY = ["a, b", "[{,", 'say "no, no"', "back\\", '\\", ', "\u2028,\n"]


def test_no_more_is_read_than_allowed(tmp_path: Path) -> None:
    """Of texts from the network, of files, and of a device that never ends."""
    text, file = '"twelve....."', tmp_path / "file"
    file.write_text(text)

    assert parse(text, largest=13) == json.loads(text)
    assert content(file, 13) == given_content(file, 13) == text.encode()
    for read in (
        lambda: parse(text, largest=12),
        lambda: content(file, 12),
        lambda: given_content(Path("/dev/zero"), 12),
    ):
        with pytest.raises(ValueError, match="12"):
            read()


def test_a_short_file_takes_no_more_memory_than_it_has(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("short")
    assert content(tmp_path / "file", 1 << 62) == b"short"
    assert given_content(tmp_path / "file", 1 << 62) == b"short"


def test_depth_is_limited_in_json_and_yaml() -> None:
    levels = foreign.DEEPEST
    for read in (parse, parse_yaml):
        assert read("[" * (levels - 1) + "]" * (levels - 1)) is not None
        with pytest.raises(ValueError, match=f"{levels} levels"):
            read("[" * (levels + 1) + "]" * (levels + 1))


@pytest.mark.parametrize(
    "text", [r'license: "mit\ud800"', r'"\udc00": mit', r'a: [&x "\uDFFF", *x]']
)
def test_half_a_character_in_yaml_is_refused(text: str) -> None:
    """A model card's licence goes into labels, which are UTF-8."""
    with pytest.raises(ValueError, match="half a character"):
        parse_yaml(text)


def test_aliases_do_not_unfold_to_more_than_a_file_could_hold(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(foreign, "_MOST_YAML", 100)
    bomb = "a: &a [x, x, x, x, x]\nb: &b [*a, *a, *a, *a, *a]\nc: [*b, *b, *b, *b, *b]"

    with pytest.raises(ValueError, match="more than 100 values"):
        parse_yaml(bomb)


def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")

    with pytest.raises(ValueError, match="not a regular file"):
        content(tmp_path / "pipe", 100)


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
