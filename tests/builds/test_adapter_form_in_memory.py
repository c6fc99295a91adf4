"""A build in memory that publishes its adapters, each alone: what it holds, and who takes it."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from weightsmith.api.commands.images import inspect_image
from weightsmith.api.commands.recipes import recipe_of_image
from weightsmith.api.commands.verify import verify_image
from weightsmith.building.build import build
from weightsmith.building.request import BuildRequest
from weightsmith.building.targets import chosen_targets
from weightsmith.core.errors import CheckFailed, InputRefused, UsageError
from weightsmith.core.ports import Silent
from weightsmith.core.values import Tree
from weightsmith.oci.modelpack import ModelDescription, model_pack
from weightsmith.oci.references import Reference
from weightsmith.recipe.file import read_recipe
from weightsmith.steps.outputs import ImageOutputs

from tests.fakes.memory import Memory, in_memory, new_signer, questions

MERGED, BESIDE = "llamacpp-q4_k_m", "llamacpp-q4_k_m-lora"
ADAPTER = "outputs=[image, adapter]"
PREFIX = "dev.weightsmith."


@pytest.fixture
def two(tmp_path: Path, quick: None) -> Iterator[Memory]:
    """Two adapters, each with a task of its own."""
    with in_memory(tmp_path, adapters=("a", "b")) as made:
        rows = [
            {"source": f"./{name}", "version": "v1", "evaluate": {"data": f"{name}.jsonl"}}
            for name in ("a", "b")
        ]
        made.write_recipe(adapters=rows, evaluate=None)
        yield made


def pulled(memory: Memory, tag: str) -> Any:
    return memory.client.pull(Reference.parse(f"{memory.repository}:1.0.0-{tag}"))


@pytest.mark.parametrize("target", [MERGED, BESIDE])
def test_it_holds_the_tested_adapters_files_and_names_its_base(memory: Memory, target: str) -> None:
    built = memory.build(ADAPTER, targets=[target], push=True)[target]

    found = pulled(memory, f"{target}-adapter")
    assert found.digest == built.forms["adapter"].digest
    files = {layer.file: b"".join(layer.open()) for layer in found.layers}
    folder = memory.home / "a"
    assert files == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert found.artifact_type == "application/vnd.cncf.model.manifest.v1+json"
    kinds = {layer.file: layer.media_type for layer in found.layers}
    assert kinds["adapter_model.safetensors"] == "application/vnd.cncf.model.weight.v1.raw"
    assert kinds["adapter_config.json"] == "application/vnd.cncf.model.weight.config.v1.raw"
    record = memory.record(target)
    labels = found.labels
    assert labels[f"{PREFIX}base.digest"] == record["base"]["digest"]
    assert labels[f"{PREFIX}base.format"] == ("q4_k_m" if target == BESIDE else "safetensors")
    assert labels[f"{PREFIX}adapter.0.digest"] == record["adapters"][0]["digest"]
    assert labels[f"{PREFIX}tested.image"] == built.published.digest
    assert labels[f"{PREFIX}score.image"] == "1.0000 contains n=8"
    assert not [key for key in labels if key.startswith((f"{PREFIX}merge.", f"{PREFIX}plan"))]

    memory.build(ADAPTER, targets=[target], push=True)
    assert memory.jobs() == []


@pytest.mark.parametrize("target", [MERGED, BESIDE])
def test_verify_says_that_it_was_tested_and_on_which_base(memory: Memory, target: str) -> None:
    memory.signer = new_signer()
    memory.build(ADAPTER, targets=[target], push=True)
    key = memory.folder / "key.pub"
    key.write_bytes(memory.signer.public)

    place = f"{memory.repository}:1.0.0-{target}-adapter"
    told = verify_image(place, key, memory.client, Silent())
    found = {one.name: (one.ok, one.found) for one in told.checks}
    assert [name for name, (ok, _) in found.items() if ok is False] == []
    assert found["signature"][0] is True
    quantized = ", quantized to q4_k_m" if target == BESIDE else ""
    assert found["base"] == (True, f"the adapter was tested on it{quantized}")
    assert {"label base", "label adapter:0", "unmerged", "weights"} <= found.keys()
    assert ("quantize" in found) == (target == BESIDE)
    ok, said = found["gate"]
    assert ok is True
    assert "adapter: 1.0000 contains, n=8" in said
    assert (
        inspect_image(place, memory.client, memory.engine)["labels"][f"{PREFIX}kind"] == "adapter"
    )


@pytest.mark.skipif(not shutil.which("oras"), reason="oras is not installed")
def test_oras_pulls_the_adapters_folder(memory: Memory) -> None:
    memory.build(ADAPTER, targets=[BESIDE], push=True)
    place, folder = f"{memory.repository}:1.0.0-{BESIDE}-adapter", memory.folder / "pulled"
    words = ["oras", "pull", "--plain-http", place, "-o", folder]
    subprocess.run(words, check=True, capture_output=True)
    words = ["oras", "manifest", "fetch", "--plain-http", place]
    said = json.loads(subprocess.run(words, check=True, capture_output=True).stdout)

    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert files == {path.name: path.read_bytes() for path in (memory.home / "a").iterdir()}
    base = memory.record(BESIDE)["base"]["digest"]
    assert said["annotations"][f"{PREFIX}base.digest"] == base


def test_another_adapter_under_its_labels_fails(memory: Memory) -> None:
    memory.build(ADAPTER, push=True)
    found, place = pulled(memory, f"{MERGED}-adapter"), f"{memory.repository}:other"
    weights = memory.home / "a" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    entries = (memory.store.digest_file(path) for path in sorted((memory.home / "a").iterdir()))
    tree = Tree(root=memory.home / "a", files=tuple(entries))
    about = ModelDescription(name="tiny", version="1.0.0", format="safetensors")
    memory.client.push(model_pack(tree, about, found.labels), Reference.parse(place))

    with pytest.raises(CheckFailed, match="no statement says how this image was made"):
        verify_image(place, None, memory.client, Silent())


def test_several_have_an_artifact_each_with_its_own_scores(two: Memory) -> None:
    two.minds.forgot["image"] = {questions("a")[0][0]}
    rows = [
        {"source": f"./{n}", "version": "v1", "evaluate": {"data": f"{n}.jsonl", "max_drop": 0.5}}
        for n in ("a", "b")
    ]
    two.write_recipe(adapters=rows, evaluate=None)
    built = two.build(ADAPTER, targets=[BESIDE], push=True)[BESIDE]

    assert sorted(built.forms) == ["adapter-a-v1", "adapter-b-v1"]
    first, second = (pulled(two, f"{BESIDE}-adapter-{name}") for name in ("a-v1", "b-v1"))
    digests = [one["digest"] for one in two.record(BESIDE)["adapters"]]
    assert [one.labels[f"{PREFIX}adapter.0.digest"] for one in (first, second)] == digests
    scores = [one.labels[f"{PREFIX}score.image"].split()[0] for one in (first, second)]
    assert scores[0] < scores[1] == "1.0000"
    assert f"{PREFIX}adapter.1.digest" not in second.labels
    for name in ("a-v1", "b-v1"):
        place = f"{two.repository}:1.0.0-{BESIDE}-adapter-{name}"
        told = verify_image(place, None, two.client, Silent())
        assert not [one for one in told.checks if one.ok is False]


def test_build_from_takes_it(two: Memory) -> None:
    two.build(ADAPTER, targets=[BESIDE], push=True)
    place = f"{two.repository}:1.0.0-{BESIDE}-adapter-b-v1"

    path = recipe_of_image(place, str(two.home / "base"), None, two.dist, two.client, Silent())
    recipe = yaml.safe_load(path.read_text())
    assert [row["version"] for row in recipe["adapters"]] == ["v1"]
    folder = path.parent / recipe["adapters"][0]["source"]
    own = two.home / "b"
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {
        p.name: p.read_bytes() for p in own.iterdir()
    }
    asked = [json.loads(line) for line in (path.parent / "eval.jsonl").read_text().splitlines()]
    wanted = [json.loads(line) for line in (two.home / "b.jsonl").read_text().splitlines()]
    assert [one["prompt"] for one in asked] == [one["prompt"] for one in wanted]
    locked = json.loads(path.with_name("recipe.lock").read_text())["sources"]
    assert locked["./adapters/0"]["digest"] == two.record(BESIDE)["adapters"][1]["digest"]

    # It is called by its number there.
    two.minds.facts = {q: ("0", text) for q, (_, text) in two.minds.facts.items()}
    two.launcher.answer = lambda question, _: two.minds.answer("image", ("0",), question)
    file = read_recipe(path, ())
    targets = chosen_targets(file, (BESIDE,), to_build=True)
    again = BuildRequest(
        file=file,
        targets=targets,
        outputs=ImageOutputs(),
        dist=two.folder / "again",
        engine_answers=True,
        locked=True,
    )
    (built,) = build(again, two.tools)
    assert built.scores["image"].score == 1


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"adapters": None}, "the recipe has none"),
        ({"adapters": [{"source": "./a", "weight": 0.5}]}, "with a weight"),
        ({"merge": {"method": "dare_linear", "density": 0.5}}, "dare_linear changes"),
        ({"adapters": [{"source": "./a"}, {"source": "./b"}]}, "merges 2 adapters"),
    ],
)
def test_an_adapter_that_was_not_tested_alone_is_refused_before_any_work(
    two: Memory, changes: dict[str, Any], why: str
) -> None:
    two.write_recipe(adapters=[{"source": "./a"}], evaluate=None)
    two.write_recipe(**{"adapters": [{"source": "./a"}], "evaluate": None, **changes})
    with pytest.raises(UsageError, match=why):
        two.build(ADAPTER, targets=[MERGED])
    assert two.jobs() == []


def test_of_a_build_with_both_only_the_unmerged_target_has_them(two: Memory) -> None:
    built = two.build(ADAPTER, targets=[MERGED, BESIDE])

    assert {name: sorted(one.forms) for name, one in built.items()} == {
        MERGED: [],
        BESIDE: ["adapter-a-v1", "adapter-b-v1"],
    }


def test_a_refused_adapter_is_not_published(two: Memory) -> None:
    two.launcher.answer = lambda question, adapter: "?"

    with pytest.raises(CheckFailed):
        two.build(ADAPTER, targets=[BESIDE], push=True)
    assert not [tag for _, tag in two.registry.manifests if "adapter" in tag]


def test_an_adapter_that_cannot_be_read_is_refused(two: Memory) -> None:
    (two.home / "b" / "adapter_model.safetensors").write_bytes(b"\x00" * 16)
    with pytest.raises(InputRefused):
        two.build(ADAPTER, targets=[BESIDE])
