"""An image on another base: weights stay, provenance stays, and what cannot be is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import pytest
from weightsmith.api.commands.rebase import rebase_image
from weightsmith.api.commands.requests import RebaseCommand
from weightsmith.api.commands.verify import verify_image
from weightsmith.building.wiring import open_tools
from weightsmith.core.errors import CheckFailed, InputRefused, UsageError
from weightsmith.core.ports import Silent
from weightsmith.oci.attachments import Attachment, AttachmentPart
from weightsmith.oci.image import Index
from weightsmith.oci.references import Reference
from weightsmith.oci.registry import RegistryLocation
from weightsmith.provenance.evidence import read_attached
from weightsmith.recipe.user_config import RunOptions

from tests.fakes.baking import bake, push_base
from tests.fakes.images import entry, foreign_image, tar_of
from tests.fakes.memory import memory_tools
from tests.unit.api.commands.conftest import Scene as Baked

ENGINE = "dev.weightsmith.engine"
VERSION = "org.opencontainers.image.version"


class Scene(Baked):
    def engine(
        self,
        tag: str,
        labels: dict[str, str],
        files: Mapping[str, bytes] = MappingProxyType({}),
        program: str = "app/llama-server",
        **more: str,
    ) -> str:
        """Push a base; return its name."""
        name = f"{self.fake.host}/base/engine:{tag}"
        own = {program: tag.encode()} if program else {"app/readme": b"x"}
        push_base(self.client, name, labels, {**own, **files}, **more)
        return name

    def bake(self, base: str, **more: Any) -> str:
        bake(self.client, self.model, base, self.key, push=self.name, force=True, **more)
        return self.name

    def rebase(self, source: str, onto: str, to: str = "team/app:2", **more: Any) -> Any:
        request = {"smoke": False, "force": False, **more}
        place = f"{self.fake.host}/{to}"
        return rebase_image(
            RebaseCommand(source=source, onto=onto, to=place, **request),
            memory_tools(self.folder, registry=self.client, key=self.key),
        )


@pytest.fixture
def scene(scene: Baked) -> Scene:
    return Scene(**vars(scene))


@pytest.mark.parametrize("order", ["engine-first", "weights-first"])
def test_weights_and_settings_stay_and_the_base_goes(scene: Scene, order: str) -> None:
    source = scene.bake(scene.base, order=order)
    onto = scene.engine("2", {ENGINE: "llamacpp", VERSION: "1.1.0", "new": "yes"}, {"lib/x": b"x"})
    done, _ = scene.rebase(source, onto)
    before, after = scene.image("team/app:1"), scene.image("team/app:2")
    place = 0 if order == "engine-first" else 2
    kept = [n for n in range(4) if n != place]
    assert [after.layers[n].digest for n in kept] == [before.layers[n].digest for n in kept]
    base = scene.image("base/engine:2").layers[0].digest
    assert after.layers[place].digest == base
    assert done.digest == after.digest
    assert (done.mounted, done.uploaded_bytes) == (1, after.config_blob.size)
    assert after.config["Entrypoint"] == before.config["Entrypoint"]
    assert after.config["Env"] == before.config["Env"]
    assert after.labels["new"] == "yes"
    assert after.labels["dev.weightsmith.engine.version"] == "1.1.0"
    assert after.labels["dev.weightsmith.rebased.from"] == before.digest


def test_what_is_no_image_is_told_before_the_registry_is_asked(scene: Scene) -> None:
    request = RebaseCommand(
        source=f"oci:{scene.folder}",
        onto=scene.base,
        to="localhost:1/a:1",
        smoke=False,
        force=False,
    )
    with pytest.raises(InputRefused, match="OCI") as error:
        rebase_image(request, memory_tools(scene.folder, registry=scene.client, key=scene.key))
    assert str(scene.folder) in str(error.value)


def test_provenance_stays_with_a_new_link(scene: Scene) -> None:
    scene.rebase(scene.name, scene.engine("2", {ENGINE: "llamacpp", VERSION: "1.1.0"}))
    second = f"{scene.fake.host}/team/app:2"
    third = scene.engine("3", {ENGINE: "llamacpp", VERSION: "1.2.0"})
    scene.rebase(second, third, "team/app:3")
    for name in (scene.name, second, f"{scene.fake.host}/team/app:3"):
        result = verify_image(name, scene.public, scene.client, Silent())
    found = {one.name: one.found for one in result.checks}
    assert scene.image("team/app:1").digest.short in found["rebase"]
    assert "4" not in found["weights"]


def test_what_others_attached_to_the_old_image_stays_with_it(scene: Scene) -> None:
    """A scan of the old engine, or a signature of the old digest, says nothing of the new one."""
    place = Reference.parse(scene.name)
    theirs = ("application/sarif+json", "application/vnd.dev.sigstore.bundle.v0.3+json")
    for kind in theirs:
        part = AttachmentPart.of_bytes(b"{}", kind)
        subject = scene.image("team/app:1").manifest_blob
        scene.client.attach(place, Attachment(artifact_type=kind, subject=subject, parts=(part,)))
    scene.rebase(scene.name, scene.engine("2", {ENGINE: "llamacpp", VERSION: "1.1.0"}))
    found = {
        tag: {one.artifact_type for one in read_attached(
            RegistryLocation(scene.client, place), scene.image(f"team/app:{tag}").digest)}
        for tag in "12"
    }  # fmt: skip
    assert found["1"] - found["2"] == set(theirs)
    assert "application/vnd.cyclonedx+json" in found["2"]


@pytest.mark.parametrize(
    ("labels", "files", "why"),
    [
        ({ENGINE: "vllm"}, {}, "declares the engine vllm"),
        ({ENGINE: "llamacpp", VERSION: "2.0.0"}, {}, "planned for 1.0.0"),
        ({ENGINE: "llamacpp"}, {"models/tiny.gguf": b"x"}, "/models/tiny.gguf"),
        ({ENGINE: "llamacpp"}, {"models": b"x"}, "/models"),
        ({ENGINE: "llamacpp"}, {"etc/weightsmith/plan.json": b"x"}, "/etc/weightsmith/plan.json"),
    ],
)
def test_a_broken_contract_is_refused(
    scene: Scene, labels: dict[str, str], files: dict[str, bytes], why: str
) -> None:
    onto = scene.engine("2", labels, files)
    with pytest.raises(InputRefused, match=why):
        scene.rebase(scene.name, onto)
    assert ("team/app", "2") not in scene.fake.manifests


def test_a_base_that_deletes_the_weights_or_has_another_platform_is_refused(
    scene: Scene,
) -> None:
    name = f"{scene.fake.host}/base/engine:2"
    scene.client.push(foreign_image(tar_of(entry(".wh.models"))), Reference.parse(name))
    with pytest.raises(InputRefused, match="models"):
        scene.rebase(scene.name, name)
    with pytest.raises(InputRefused, match="linux/arm64"):
        scene.rebase(scene.name, scene.engine("3", {ENGINE: "llamacpp"}, platform="linux/arm64"))


def test_an_engine_that_there_is_not_is_said_before_the_registry_is_asked(scene: Scene) -> None:
    scene.fake.faults.append(("POST", "/uploads/", "403"))
    with pytest.raises(UsageError, match="no built-in base image for foo") as caught:
        scene.rebase(scene.name, "engine:foo")
    assert "--onto" in caught.value.hint
    assert scene.fake.faults


@pytest.mark.slow
def test_an_index_stays_one(scene: Scene) -> None:
    """Every platform's image is moved, or none is."""
    bases = []
    for tag in "12":
        labels = {ENGINE: "llamacpp", VERSION: f"1.{tag}.0"}
        each = []
        for machine in ("amd64", "arm64"):
            name = scene.engine(f"{tag}-{machine}", labels, platform=f"linux/{machine}")
            each.append(scene.client.pull(Reference.parse(name), platform=f"linux/{machine}"))
        bases.append(f"{scene.fake.host}/base/engine:{tag}")
        scene.client.push(Index(images=tuple(each)), Reference.parse(bases[-1]), force=True)
    first, second = bases
    source = scene.bake(first)
    done, before = scene.rebase(source, second)
    assert before == scene.client.digest_of(Reference.parse(source))
    name = f"{scene.fake.host}/team/app:2"
    assert done.digest == scene.client.digest_of(Reference.parse(name))
    verify_image(name, scene.public, scene.client, Silent())
    each = [
        scene.client.pull(Reference.parse(name), platform=f"linux/{machine}")
        for machine in ("amd64", "arm64")
    ]
    assert [image.platform for image in each] == ["linux/amd64", "linux/arm64"]
    assert {image.labels["dev.weightsmith.engine.version"] for image in each} == {"1.2.0"}
    assert each[0].layers[0].digest != each[1].layers[0].digest
    with pytest.raises(InputRefused, match=r"linux/amd64.*linux/arm64"):
        scene.rebase(source, scene.engine("3", {ENGINE: "llamacpp"}), "team/app:3")
    assert ("team/app", "3") not in scene.fake.manifests


def test_folders_of_the_base_do_not_collide(scene: Scene) -> None:
    name = f"{scene.fake.host}/base/engine:2"
    tar = tar_of(entry("models", b"5", 0o755), entry("etc", b"5", 0o755), (entry("etc/x"), b"1"))
    scene.client.push(foreign_image(tar), Reference.parse(name))
    scene.rebase(scene.name, name)


def test_only_our_own_images_can_be_taken_apart(scene: Scene) -> None:
    with pytest.raises(InputRefused, match="base/engine"):
        scene.rebase(scene.base, scene.engine("2", {}))


@pytest.mark.parametrize("kind", ["modelpack", "ollama"])
def test_a_form_without_an_engine_has_no_base(scene: Scene, kind: str) -> None:
    with pytest.raises(InputRefused, match="holds a model's files and no engine"):
        scene.rebase(scene.bake("", kind=kind), scene.engine("2", {ENGINE: "llamacpp"}))


@pytest.mark.docker
@pytest.mark.slow
def test_a_base_without_the_program_is_named_with_what_it_lacks(scene: Scene) -> None:
    """It had been the engine's fault: "see `docker info`"."""
    onto = scene.engine("2", {ENGINE: "llamacpp", VERSION: "1.1.0"}, {}, program="")
    wanted = RebaseCommand(
        source=scene.name, onto=onto, to=f"{scene.fake.host}/team/app:2", smoke=True, force=False
    )
    with open_tools(RunOptions(), Silent()) as tools:
        assert tools.images_in_engine
        with pytest.raises(CheckFailed) as caught:
            rebase_image(wanted, replace(tools, registry=scene.client))
    assert caught.value.message.startswith(f"the image does not work on {onto}: it cannot be")
    assert "'/app/llama-server'" in caught.value.message
    assert "--no-smoke" in caught.value.hint
    assert "docker info" not in caught.value.message + caught.value.hint
    assert ("team/app", "2") not in scene.fake.manifests


def test_a_tag_that_exists_needs_force(scene: Scene) -> None:
    onto = scene.engine("2", {ENGINE: "llamacpp", VERSION: "1.1.0"})
    with pytest.raises(UsageError, match="team/app:1"):
        scene.rebase(scene.name, onto, "team/app:1")
    scene.rebase(scene.name, onto, "team/app:1", force=True)
    done, _ = scene.rebase(scene.name, onto, "prod/app:1")
    assert done.mounted == 5
