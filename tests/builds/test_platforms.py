"""`build` for each platform of its base: images under one name, by the lock's digests."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from weightsmith.api.commands.images import inspect_image, inspect_text
from weightsmith.api.commands.verify import verify_image
from weightsmith.core.errors import CheckFailed, InputRefused
from weightsmith.core.ports import Silent
from weightsmith.oci.references import Reference
from weightsmith.oci.registry import Registry
from weightsmith.outside.docker import DockerEngine

from tests.fakes.baking import make_key, push_base
from tests.fakes.command_line import weightsmith
from tests.fakes.registry import FakeRegistry, fake_registry
from tests.paths import ROOT

TINY = ROOT / "examples" / "tiny" / "base"
INDEX = "application/vnd.oci.image.index.v1+json"
MACHINES = ("amd64", "arm64")


class Scene:
    def __init__(self, fake: FakeRegistry, client: Registry, folder: Path) -> None:
        self.fake, self.client, self.folder = fake, client, folder
        self.key, self.public = make_key(folder)
        self.base("1")

    def base(self, content: str) -> None:
        """Push an engine base for two platforms, always under the same tag."""
        rows = []
        for machine in MACHINES:
            name = f"{self.fake.host}/base/vllm:{machine}"
            files = {"app/vllm": f"{machine} {content}".encode()}
            labels = {"dev.weightsmith.engine": "vllm"}
            push_base(self.client, name, labels, files, platform=f"linux/{machine}")
            data, kind = self.client.read_manifest(Reference.parse(name))
            rows.append({"mediaType": kind, "size": len(data),
                         "digest": self.client.digest_of(Reference.parse(name)),
                         "platform": {"os": "linux", "architecture": machine}})  # fmt: skip
        index = json.dumps({"schemaVersion": 2, "mediaType": INDEX, "manifests": rows}).encode()
        self.client.push_manifest(self.at("base/vllm:1"), index, INDEX)

    def at(self, name: str) -> Reference:
        return Reference.parse(f"{self.fake.host}/{name}")

    def build(self, *words: str, **image: Any) -> dict[str, Any]:
        """Build for a GPU that is not here, so that nothing has to be started or merged."""
        recipe = {
            "name": "tiny",
            "base": {"source": str(TINY)},
            "targets": ["vllm"],
            "serve": {"gpu": "nvidia-l4"},
            "image": {"repository": f"{self.fake.host}/ml/tiny",
                      "base": f"{self.fake.host}/base/vllm:1", **image},
        }  # fmt: skip
        (self.folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        said = weightsmith("build", "--recipe", self.folder / "recipe.yaml", "--runner", "local",
                           "--dist", self.folder / "dist", "--json", *words)  # fmt: skip
        told = json.loads(said.out)
        return told["targets"]["vllm"] if "targets" in told else told["error"]

    def weights(self, machine: str, name: str = "ml/tiny:0.1.0-vllm") -> list[str]:
        image = self.client.pull(self.at(name), platform=f"linux/{machine}")
        return [layer.digest for layer in image.layers if layer.file.startswith("models/")]


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    monkeypatch.setenv("WEIGHTSMITH_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("WEIGHTSMITH_CACHE", str(tmp_path / "cache"))
    with fake_registry() as fake, Registry(pause=lambda _: None) as client:
        yield Scene(fake, client, tmp_path)


@pytest.mark.slow
def test_an_image_for_each_platform_shares_the_weights(scene: Scene) -> None:
    built = scene.build("--push", "--layout", str(scene.folder / "out"),
                        "--sign-key", str(scene.key))  # fmt: skip
    name = scene.at("ml/tiny:0.1.0-vllm")
    assert scene.client.digest_of(name) == built["digest"]
    pinned = f"{name}-{built['digest'][7:19]}"
    assert scene.client.digest_of(Reference.parse(pinned)) == built["digest"]
    assert scene.weights("amd64") == scene.weights("arm64")
    for place in (str(name), str(scene.folder / "out")):
        result = verify_image(place, scene.public, scene.client, Silent())
        checks = {row["check"] for row in result["checks"]}
        assert result["digest"] == built["digest"]
        assert {"signature", "linux/amd64 signature", "linux/arm64 weights"} <= checks
    again = scene.build("--push", "--layout", str(scene.folder / "out"))
    assert (again["digest"], again["uploaded_bytes"]) == (built["digest"], 0)
    # Each platform's image can be shown, and what the name stands for.
    for machine in MACHINES:
        seen = inspect_image(str(name), scene.client, DockerEngine(), f"linux/{machine}")
        assert seen["digest"] == scene.client.pull(name, platform=f"linux/{machine}").digest
        assert (seen["index"], seen["platforms"]) == (
            built["digest"],
            ["linux/amd64", "linux/arm64"],
        )
        assert f"linux/{machine}, one of linux/amd64, linux/arm64" in inspect_text(seen)
    one = f"{name.registry}/base/vllm:amd64"
    with pytest.raises(InputRefused, match="linux/amd64"):
        inspect_image(one, scene.client, DockerEngine(), "linux/arm64")
    # One platform's layer is damaged: it is told which one.
    arm = scene.client.pull(name, platform="linux/arm64").layers[0].digest
    scene.fake.blobs["ml/tiny", arm] = scene.fake.blobs["ml/tiny", arm][::-1]
    with pytest.raises(CheckFailed) as caught:
        verify_image(str(name), scene.public, scene.client, Silent())
    bad = [row["check"] for row in caught.value.details["checks"] if row["ok"] is False]
    assert bad == ["linux/arm64 layer 0"]


@pytest.mark.slow
def test_the_lock_decides_which_base(scene: Scene) -> None:
    first = scene.build("--push")
    scene.base("2")
    assert scene.build("--push")["digest"] == first["digest"]
    (scene.folder / "recipe.lock").unlink()
    assert "--force" in scene.build("--push")["hint"]
    one = scene.build("--push", "--force", platforms=["linux/arm64"])
    kind = scene.client.read_manifest(scene.at("ml/tiny:0.1.0-vllm"))[1]
    assert kind == "application/vnd.oci.image.manifest.v1+json"
    assert one["digest"] not in (first["digest"], "")
    missing = scene.build(platforms=["linux/s390x"])
    assert "linux/s390x" in missing["message"]


def test_layers_are_kept_as_small_as_the_recipe_says(scene: Scene) -> None:
    built = scene.build("--push", max_layer_size="3MB", order="weights-first")
    image = scene.client.pull(scene.at("ml/tiny:0.1.0-vllm"), platform="linux/amd64")
    assert max(layer.size for layer in image.layers) <= 3_000_000
    assert image.layers[-2].file == "app/vllm"
    result = verify_image(built["image"], None, scene.client, Silent())
    assert any(row["check"] == "linux/amd64 split" for row in result["checks"])


def test_what_will_not_fit_a_layer_is_refused_before_the_work(scene: Scene) -> None:
    told = scene.build("--target", "llamacpp-q8_0", max_layer_size="1MB")
    assert "quantize.split_max_size" in told["hint"]
    assert told["exit_code"] == 2
