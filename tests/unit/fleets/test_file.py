"""fleet.yaml: what it may say, and where a fault is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from weightsmith.core.errors import UsageError
from weightsmith.fleets.cells import AdapterBuild, builds_of, lock_of
from weightsmith.fleets.file import read_fleet

RECIPE: dict[str, Any] = {
    "name": "bot",
    "version": "1.0.0",
    "base": {"source": "./base"},
    "evaluate": {"data": "eval.jsonl", "max_drop": 0.1},
    "targets": ["llamacpp-q4_k_m"],
    "image": {"repository": "registry.example.com/ml/bot"},
}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    for name in ("one", "two", "Legal_V2"):
        (tmp_path / "adapters" / name).mkdir(parents=True)
    (tmp_path / "adapters" / "README.md").write_text("no adapter")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    return tmp_path


def builds(home: Path, **fleet: Any) -> tuple[AdapterBuild, ...]:
    path = home / "fleet.yaml"
    path.write_text(yaml.safe_dump(fleet))
    found = read_fleet(path)
    return builds_of(found, path, lock_of(found, path))


def test_a_glob_is_one_build_for_each_folder(home: Path) -> None:
    found = builds(home, adapters=["./adapters/*"])

    assert [one.adapter for one in found] == ["legal-v2", "one", "two"]
    assert [one.file.recipe.name for one in found] == ["bot-legal-v2", "bot-one", "bot-two"]
    assert [one.file.recipe.image.repository for one in found] == [
        f"registry.example.com/ml/bot-{name}" for name in ("legal-v2", "one", "two")
    ]
    assert found[1].file.recipe.adapters[0].source == str(home / "adapters" / "one")
    assert found[1].file.recipe.base.source == str(home / "base")
    assert [target.name for one in found for target in one.targets] == ["llamacpp-q4_k_m"] * 3


def test_an_entry_says_what_differs(home: Path) -> None:
    entry = {
        "name": "legal",
        "source": "hf://acme/legal-lora",
        "revision": "a" * 40,
        "version": "v3",
        "evaluate": {"data": "legal.jsonl"},
        "serve": {"max_model_len": 512},
        "targets": ["vllm"],
    }
    (found,) = builds(home, adapters=[entry], targets=["llamacpp"])

    recipe = found.file.recipe
    assert (recipe.adapters[0].source, recipe.adapters[0].version) == (entry["source"], "v3")
    assert (recipe.evaluate[0].data, recipe.evaluate[0].max_drop) == (
        str(home / "legal.jsonl"),
        0.1,
    )
    assert recipe.serve.max_model_len == 512
    assert [target.name for target in found.targets] == ["vllm"]


def with_hub(home: Path, hub: str, *targets: str) -> None:
    recipe = {**RECIPE, "outputs": {"hub": hub}, "targets": list(targets)}
    (home / "recipe.yaml").write_text(yaml.safe_dump(recipe))


def test_each_adapter_has_its_own_repository_on_a_hub(home: Path) -> None:
    with_hub(home, "hf://acme/bot-{target}", "vllm", "llamacpp")
    found = builds(home, adapters=["./adapters/one", "./adapters/two"])

    assert [one.file.recipe.outputs.hub for one in found] == [
        "hf://acme/bot-{target}-one", "hf://acme/bot-{target}-two",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("hub", "targets", "names"),
    [
        ("hf://acme/bot", ("vllm", "llamacpp"), ("one",)),
        ("hf://acme/bot-{target}", ("vllm", "vllm-awq"), ("one", "awq-one")),
    ],
)
def test_two_models_of_one_name_on_a_hub_are_refused(
    home: Path, hub: str, targets: tuple[str, ...], names: tuple[str, ...]
) -> None:
    with_hub(home, hub, *targets)
    entries = [{"name": name, "source": "./adapters/one"} for name in names]
    with pytest.raises(UsageError, match="would both be hf://acme/bot") as caught:
        builds(home, adapters=entries)
    assert "{target}" in caught.value.hint


def test_the_recipe_may_lie_elsewhere_and_a_folder_stands_for_it(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does the current folder matter."""
    monkeypatch.chdir(home.parent)
    (one,) = builds(Path(home.name), recipe=".", adapters=["./adapters/one"])
    assert one.file.recipe.name == "bot-one"
    assert one.file.recipe.adapters[0].source == str(home / "adapters" / "one")
    with pytest.raises(UsageError, match=r"/recipe\.yaml: no such recipe"):
        builds(home, recipe="/", adapters=["./adapters/one"])

    (home / "shared").mkdir()
    (home / "recipe.yaml").rename(home / "shared" / "r.yaml")
    found = builds(home, recipe="shared/r.yaml", adapters=["./adapters/one"])[0].file.recipe
    assert found.base.source == str(home / "shared" / "base")
    assert found.evaluate[0].data == str(home / "shared" / "eval.jsonl")


def test_pins_of_the_recipes_lock_are_used(home: Path) -> None:
    commit = "b" * 40
    recipe = {**RECIPE, "base": {"source": "hf://acme/base"}}
    (home / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    row = {"pin": f"hf://acme/base@{commit}", "digest": "sha256:" + "0" * 64}
    (home / "recipe.lock").write_text(json.dumps({"bases": {}, "sources": {"hf://acme/base": row}}))

    (found,) = builds(home, adapters=["./adapters/one"])

    assert found.file.recipe.base.revision == commit


@pytest.mark.parametrize(
    ("fleet", "said"),
    [
        ({}, "`adapters` is missing"),
        ({"adapters": []}, "`adapters` is empty"),
        (
            {"adapters": ["./adapters/*"], "target": ["x"]},
            "unknown key `target`, did you mean `targets`",
        ),
        (
            {"adapters": ["./adapters/*"], "base": {}},
            "unknown key `base` (it belongs into the recipe)",
        ),
        (
            {"adapters": [{"source": "x", "evalute": {}}]},
            "unknown key `adapters.0.evalute`, did you mean `evaluate`",
        ),
        ({"adapters": [{"name": "x"}]}, "`adapters.0.source` is missing"),
        ({"adapters": [{"source": "x", "name": "A b"}]}, "`adapters.0.name`: 'A b' must be small"),
        ({"adapters": [7]}, "`adapters.0`"),
        ({"adapters": ["./none/*"]}, "adapters.0: no folder matches `./none/*`"),
        (
            {"adapters": ["./adapters/*", "./adapters/one"]},
            "adapters.1 (one) and adapters.0 (one) are both named `one`",
        ),
        ({"adapters": ["./adapters/one"], "targets": ["vllm", "vllm"]}, "name one target twice"),
        ({"adapters": ["./adapters/one"], "targets": ["nosuch"]}, "nosuch"),
        (
            {"adapters": [{"source": "./adapters/one", "evaluate": {"max_dorp": 1}}]},
            "adapters.0: unknown key `evaluate.max_dorp`, did you mean `max_drop`",
        ),
        ({"adapters": ["./adapters/one"], "recipe": "none.yaml"}, "none.yaml: no such recipe"),
        (
            {
                "adapters": [
                    {"source": "./adapters/one", "image": {"repository": "same"}},
                    {"source": "./adapters/two", "image": {"repository": "same"}},
                ]
            },
            "one and two would both be the image same:1.0.0-llamacpp-q4_k_m",
        ),
        (
            {"adapters": [{"source": "./adapters/one", "quantize": {"bits": 4.5}}]},
            "adapters.0: quantize.bits: llamacpp-q4_k_m does not read it",
        ),
    ],
)
def test_a_fault_is_named_with_its_place(home: Path, fleet: Any, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        builds(home, **fleet)

    assert said in caught.value.message
    assert caught.value.message.startswith(str(home))
    assert caught.value.hint


def test_a_setting_of_the_recipe_is_read_by_one_of_all_targets(home: Path) -> None:
    recipe = {**RECIPE, "quantize": {"group_size": 64}}
    (home / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    awq = {"source": "./adapters/two", "targets": ["vllm-awq"]}

    assert len(builds(home, adapters=["./adapters/one", awq])) == 2
    with pytest.raises(
        UsageError, match=r"one: quantize.group_size: .* does not read it"
    ) as caught:
        builds(home, adapters=["./adapters/one"])
    assert "-awq" in caught.value.hint

    with_auto = {**RECIPE, "auto": {"engine": ["llamacpp"]}}
    (home / "recipe.yaml").write_text(yaml.safe_dump({**with_auto, "targets": ["auto"]}))
    assert builds(home, adapters=["./adapters/one"], targets=["vllm"])
    (home / "recipe.yaml").write_text(yaml.safe_dump(with_auto))
    with pytest.raises(UsageError, match="no target is auto"):
        builds(home, adapters=["./adapters/one"])


def test_a_missing_file_and_broken_yaml_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"fleet\.yaml: no such fleet file"):
        read_fleet(tmp_path)
    (tmp_path / "fleet.yaml").write_text("adapters: [")
    with pytest.raises(UsageError, match="not valid YAML: line 1"):
        read_fleet(tmp_path)


def test_a_folder_with_an_at_sign_above_it_keeps_its_name(home: Path) -> None:
    (home / "x@y" / "one").mkdir(parents=True)

    assert builds(home, adapters=["./x@y/*"])[0].adapter == "one"
    named = builds(home, adapters=["hf://acme/legal@main"])[0]
    assert named.adapter == "legal"


def test_a_folder_whose_name_is_no_text_is_refused(home: Path) -> None:
    (home / "other" / b"\xff".decode(errors="surrogateescape")).mkdir(parents=True)

    with pytest.raises(UsageError, match="is not UTF-8"):
        builds(home, adapters=["./other/*"])
