"""What users write is checked once: every door refuses what no later code could hold."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Callable
from typing import Any

import pytest
import weightsmith
from weightsmith.core.errors import UsageError
from weightsmith.core.values import canonical
from weightsmith.fleets.file import check_fleet, read_fleet
from weightsmith.recipe.file import check_recipe, check_section, read_recipe, with_settings
from weightsmith.recipe.schema import Serve
from weightsmith.recipe.user_config import VARIABLE, read_config

SMALLEST = {"name": "bot", "base": {"source": "./base"}}
DEEP: dict[str, Any] = {}
for _ in range(2000):
    DEEP = {"a": DEEP}

UNFIT = {
    "NUL": "a\0b",
    "half a character": "\ud800",
    "not a number": float("nan"),
    "infinity": float("-inf"),
    "more than 64 bits": 1 << 64,
    "more digits than Python writes": 16**5000,
    "a date": dt.date(2026, 12, 1),
    "bytes": b"a",
    "a set": {1},
    "a key of another type": {1: "a"},
    "a key with NUL": {"a\0": 1},
    "a key of half a character": {"\udc80": 1},
    "depth without end": DEEP,
}
DOORS: dict[str, Callable[[Any], object]] = {
    "text": lambda value: check_recipe(SMALLEST | {"base": {"source": value}}, "here"),
    "number": lambda value: check_recipe(SMALLEST | {"serve": {"max_num_seqs": value}}, "here"),
    "truth or word": lambda value: check_recipe(SMALLEST | {"quality": {"gate": value}}, "here"),
    "word": lambda value: check_recipe(SMALLEST | {"merge": {"method": value}}, "here"),
    "any": lambda value: check_recipe(SMALLEST | {"serve": {"extra": {"a": [value]}}}, "here"),
    "section": lambda value: check_section(Serve, {"extra": {"a": value}}, "here"),
    "fleet": lambda value: check_fleet({"adapters": [{"source": "a", "serve": {"x": value}}]}, "f"),
    "caller": lambda value: weightsmith.plan(SMALLEST | {"card": {"description": value}}),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("unfit", UNFIT)
def test_a_value_that_is_not_jsons_is_refused(door, unfit):
    with pytest.raises(UsageError) as caught:
        DOORS[door](UNFIT[unfit])

    assert caught.value.hint
    caught.value.message.encode()


YAML = {
    "NUL": r'"a\0b"',
    "half a character": r'"\ud800"',
    "not a number": ".nan",
    "infinity": "-.INF",
    "more digits than Python writes": "0x" + "f" * 5000,
    "bytes": "!!binary aGk=",
    "a set": "!!set {a, b}",
    "a timestamp": "!!timestamp 2026-12-01",
    "pairs": "!!omap [a: 1]",
    "an object": "!!python/name:os.system",
    "a key twice": "{a: 1, a: 2}",
    "a key twice, of other types": "{1: a, 1.0: b}",
    "a key of another type": "{1: a}",
    "a key that is a list": "{[a]: 1}",
}


@pytest.mark.parametrize("unfit", YAML)
def test_yaml_of_ours_that_is_not_jsons_is_refused(unfit, tmp_path, monkeypatch):
    """In a recipe, a fleet file and the configuration, by one rule."""
    monkeypatch.setenv(VARIABLE, str(tmp_path / "config.yaml"))
    text = YAML[unfit]
    for name, content in {
        "recipe.yaml": f"name: bot\nbase: {{source: ./base}}\nserve: {{extra: {{x: {text}}}}}\n",
        "fleet.yaml": f"adapters: [{{source: a, serve: {{extra: {{x: {text}}}}}}}]\n",
        "config.yaml": f"cache: {{where: {text}}}\n",
    }.items():
        (tmp_path / name).write_text(content)
    for read in (
        lambda: read_recipe(tmp_path / "recipe.yaml"),
        lambda: read_fleet(tmp_path / "fleet.yaml"),
        read_config,
    ):
        with pytest.raises(UsageError) as caught:
            read()
        assert str(tmp_path) in caught.value.message


@pytest.mark.parametrize(
    "text",
    [
        "cache:\n  verify_key: a.pem\n  where: s3://a/b\n  verify_key: ''\n",
        "cache: {verify_key: a.pem}\ncache: s3://a/b\n",
    ],
)
def test_a_key_that_the_configuration_has_twice(text, tmp_path, monkeypatch):
    """The second would silently switch off that only signed results are used."""
    path = tmp_path / "config.yaml"
    path.write_text(text)
    monkeypatch.setenv(VARIABLE, str(path))

    with pytest.raises(UsageError, match=r"config\.yaml: not valid YAML: line \d.*duplicate key"):
        read_config()


def test_what_passes_the_door_is_written_as_json():
    extra = {"a": [1, -1.5, True, None, "ä"], "b": {"c": (2, "")}}
    recipe = check_recipe(with_settings(SMALLEST | {"serve": {"extra": extra}}, []), "here")

    written = canonical(recipe.serve.extra)
    assert json.loads(written) == {"a": [1, -1.5, True, None, "ä"], "b": {"c": [2, ""]}}


@pytest.mark.parametrize("value", [b"a", dt.date(2026, 12, 1), object()])
def test_what_json_has_not_is_never_written(value):
    with pytest.raises(TypeError, match="no JSON form"):
        canonical({"a": [value]})
