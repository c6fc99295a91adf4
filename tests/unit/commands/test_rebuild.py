"""An image names what it was made of, so it can be made again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.fakes.baking import make_key, push_base
from tests.fakes.registry import FakeRegistry, fake_registry
from toolchain.commands.rebuild import recipe_of_image
from toolchain.drivers.signer import open_signer
from toolchain.errors import InputRefused, UsageError
from toolchain.oci.places import RegistryPlace
from toolchain.oci.references import Reference
from toolchain.oci.registry import Registry
from toolchain.ports import Silent
from toolchain.provenance.sealing import seal
from toolchain.recipe_file import RecipeFile, check_recipe, read_recipe
from toolchain.stages.attest import Made, evidence, public_recipe
from toolchain.stages.lock import read_lock
from toolchain.values import (
    SAFETENSORS,
    AdapterSnapshot,
    Artifact,
    Checkpoint,
    Digest,
    FileEntry,
    Score,
    Snapshot,
    Sources,
    Tree,
)

COMMIT = "c" * 40


def tree(root: Path, **files: str) -> Tree:
    entries = []
    for name, text in files.items():
        path = root / name.replace("_json", ".json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        digest = Digest.of(text.encode())
        entries.append(FileEntry(path=path.name, size=len(text), digest=digest))
    return Tree(root=root, files=tuple(entries))


class Scene:
    def __init__(self, fake: FakeRegistry, client: Registry, folder: Path) -> None:
        self.client, self.folder, self.fake = client, folder, fake
        self.name = f"{fake.host}/team/app:1"
        self.key, self.public = make_key(folder)

    def publish(self, pin: str, source: str) -> None:
        """Push an image as `build` would, of a base and two adapters."""
        push_base(self.client, self.name, {}, {"models/x": b"1"})
        image = self.client.pull(Reference.parse(self.name), platform="linux/amd64")
        base = tree(self.folder / "base", config_json="{}")
        adapters = [tree(self.folder / f"a{n}", adapter_config_json=f"{n}") for n in (0, 1)]
        merged = tree(self.folder / "merged", model="m")
        recipe = check_recipe(
            {
                "name": "x",
                "base": {"source": source},
                "adapters": [{"source": str(self.folder / "a0"), "version": "v7", "weight": 0.5},
                             {"source": "./a1"}],
                "evaluate": {"data": str(self.folder / "eval.jsonl"), "max_drop": 0.2},
                "targets": ["vllm"],
                "merge": {"method": "linear"},
            },
            "test",
        )  # fmt: skip
        item = {"prompt": "Capital of Ö?", "expected": ["A"], "answer": "A", "ok": True}
        artifact = Artifact(format=SAFETENSORS, tree=merged, made_from=())
        made = Made(
            image=image,
            artifact=artifact,
            served=artifact,
            base=None,
            base_name="",
            name="x",
            version="1",
            parameters={"recipe": public_recipe(recipe)},
            sources=Sources(
                base=Snapshot(tree=base, source=source, pin=pin or base.digest, pinned=True),
                adapters=tuple(
                    AdapterSnapshot(snapshot=Snapshot(
                        tree=a, source="./a", pin=a.digest, pinned=True))
                    for a in adapters
                ),
            ),
            checkpoint=Checkpoint(tree=merged, made_from=()),
            recipe=recipe,
            scores={"image": Score(score=1.0, n=1, metric="contains", per_item=(item,))},
        )  # fmt: skip
        place = RegistryPlace(self.client, Reference.parse(self.name))
        told = evidence(made)
        assert str(self.folder) not in json.dumps(told.statements)
        for attachment in seal(told, image.manifest_blob, "x", open_signer(str(self.key))):
            place.attach(attachment)

    def again(self, base: str = "", key: Path | None = None) -> RecipeFile:
        dist = self.folder / "dist"
        path = recipe_of_image(self.name, base, key or self.public, dist, self.client, Silent())
        return read_recipe(path)


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    with fake_registry() as fake, Registry(pause=lambda _: None) as client:
        yield Scene(fake, client, tmp_path)


def test_sources_questions_and_pins_come_back(scene: Scene) -> None:
    scene.publish(f"hf://a/b@{COMMIT}", "hf://a/b")
    file = scene.again()
    recipe = file.recipe
    assert (recipe.base.source, recipe.base.revision) == ("hf://a/b", COMMIT)
    assert [(a.version, a.weight) for a in recipe.adapters] == [("v7", 0.5), ("", 1.0)]
    for number, adapter in enumerate(recipe.adapters):
        written = file.folder / adapter.source / "adapter_config.json"
        assert written.read_text() == str(number)
    assert recipe.merge.method == "linear"
    assert recipe.evaluate is not None
    assert recipe.evaluate.max_drop == 0.2
    rows = (file.folder / recipe.evaluate.data).read_text("utf-8").splitlines()
    assert json.loads(rows[0]) == {"prompt": "Capital of Ö?", "expected": ["A"]}
    lock = read_lock(file)
    assert lock.sources["hf://a/b"]["pin"] == f"hf://a/b@{COMMIT}"
    assert len(lock.sources) == 3


def test_a_base_that_was_a_folder_has_to_be_named(scene: Scene) -> None:
    scene.publish("", "/somewhere/base")
    with pytest.raises(UsageError, match="was a folder") as caught:
        scene.again()
    assert "--base" in caught.value.hint
    assert "/somewhere" not in caught.value.message
    file = scene.again(str(scene.folder / "base"))
    assert file.recipe.base.source == str(scene.folder / "base")


def test_only_what_the_key_signed_is_believed(scene: Scene) -> None:
    scene.publish(f"hf://a/b@{COMMIT}", "hf://a/b")
    _, other = make_key(scene.folder, "other")
    with pytest.raises(InputRefused, match="signed by this key"):
        scene.again(key=other)


def test_another_adapter_than_stated_is_refused(scene: Scene) -> None:
    scene.publish(f"hf://a/b@{COMMIT}", "hf://a/b")
    place = RegistryPlace(scene.client, Reference.parse(scene.name))
    digest = scene.client.digest_of(place.reference)
    assert digest is not None
    tag = f"sha256-{digest.hex}"
    kind, data = scene.fake.manifests["team/app", tag]
    index = json.loads(data)
    evil = [place.read(blob, t) for blob, t in place.attached(digest)]
    adapter = next(a for a in evil if "adapter" in a.artifact_type)
    part = type(adapter.parts[0]).of_bytes(b"evil", "application/octet-stream",
                                           **adapter.parts[0].annotations)  # fmt: skip
    index["manifests"] = [r for r in index["manifests"] if r["digest"] != adapter.blob.digest]
    scene.fake.manifests["team/app", tag] = (kind, json.dumps(index).encode())
    place.attach(replace(adapter, parts=(part,), raw=None))
    with pytest.raises(InputRefused, match="not attached unchanged"):
        scene.again()


def test_an_image_that_was_only_baked(scene: Scene) -> None:
    push_base(scene.client, scene.name, {}, {"models/x": b"1"})
    with pytest.raises(InputRefused, match="no statement"):
        scene.again()
