"""The recipe: faults are named with the nearest right spelling, the schema is what is checked."""

import json
from pathlib import Path

import jsonschema
import pytest
import yaml
from weightsmith.errors import UsageError
from weightsmith.recipe_file import check_recipe, read_recipe, with_settings

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted(ROOT.glob("examples/*/recipe*.yaml"))
SMALLEST = {"name": "bot", "base": {"source": "./base"}}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_examples_pass_the_published_schema(path: Path) -> None:
    schema = json.loads((ROOT / "docs/reference/recipe.schema.json").read_text())
    jsonschema.validate(yaml.safe_load(path.read_text()), schema)

    assert read_recipe(path).recipe.targets
    assert path.read_text().startswith("# yaml-language-server: $schema=")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adaptors": []}, "unknown key `adaptors`, did you mean `adapters`"),
        ({"merge": {"presicion": "exact"}}, "did you mean `precision`"),
        (
            {"adapters": [{"source": "a", "wieght": 2}]},
            "`adapters.0.wieght`, did you mean `weight`",
        ),
        ({"name": "Not A Name"}, "`name`"),
        ({"serve": {"max_model_len": 0}}, "`serve.max_model_len"),
        ({"base": {}}, "`base.source` is missing"),
        ({"merge": {"method": "soup"}}, "`merge.method`"),
        ({"adapters": [{"source": "a", "weight": float("nan")}]}, "`adapters.0.weight`"),
    ],
)
def test_faults_are_named(change: dict, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_recipe(SMALLEST | change, "recipe.yaml")

    assert message in str(caught.value)
    assert caught.value.hint


def test_settings_override_and_leave_the_original_alone() -> None:
    data = {"serve": {"gpu": "x"}}
    changed = with_settings(
        data, ["serve.max_model_len=4096", "serve.extra.flash-attn=on", "a=1.5"]
    )

    assert changed == {
        "serve": {"gpu": "x", "max_model_len": 4096, "extra": {"flash-attn": True}},
        "a": 1.5,
    }
    assert data == {"serve": {"gpu": "x"}}


@pytest.mark.parametrize("setting", ["novalue", "=x", "name.first=x"])
def test_settings_that_are_none(setting: str) -> None:
    with pytest.raises(UsageError, match="--set"):
        with_settings(SMALLEST, [setting])


def test_elements_of_a_list_are_set_by_number():
    data = {"adapters": [{"source": "a"}, {"source": "b"}]}

    assert with_settings(data, ["adapters.1.weight=0.5"])["adapters"][1] == {
        "source": "b",
        "weight": 0.5,
    }
    assert with_settings(data, ["adapters.0={source: c}"])["adapters"][0] == {"source": "c"}
    for setting in ("adapters.2={source: c}", "adapters.x=1", "adapters.7.weight=1"):
        with pytest.raises(UsageError, match="--set"):
            with_settings(data, [setting])


def test_a_wrong_key_of_a_merge_is_named_with_the_nearest() -> None:
    data = {"name": "x", "base": {"source": "x"}, "merge": {"densty": 0.5}}

    with pytest.raises(UsageError, match=r"unknown key `merge\.densty`, did you mean `density`"):
        check_recipe(data, "here")


def test_a_wrong_key_below_a_key_of_the_users_own_is_named() -> None:
    data = {"name": "x", "base": {"source": "x"}, "quality": {"limits": {"q4_k_m": {"kl_men": 1}}}}

    with pytest.raises(UsageError, match=r"quality\.limits\.q4_k_m\.kl_men.*kl_mean"):
        check_recipe(data, "here")
