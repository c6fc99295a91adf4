"""An image is what it is stated to be, or `verify` says what of it is not."""

from __future__ import annotations

import base64
import json
import subprocess
from dataclasses import replace

import pytest
from weightsmith.api.commands.images import inspect_image, inspect_text
from weightsmith.api.commands.rebase import rebase_image
from weightsmith.api.commands.requests import RebaseCommand
from weightsmith.api.commands.verify import table, verify_image
from weightsmith.core.errors import CheckFailed, InputRefused, UsageError
from weightsmith.core.platforms import host_platform
from weightsmith.core.ports import Silent
from weightsmith.core.values import Digest, canonical, plain
from weightsmith.oci.image import Image
from weightsmith.oci.layers import Member, TarLayer
from weightsmith.oci.manifests import OCI_INDEX, OCI_MANIFEST
from weightsmith.oci.references import Reference
from weightsmith.oci.registry import Registry, RegistryLocation
from weightsmith.outside.docker import DockerEngine
from weightsmith.provenance.chain import Check

from tests.fakes.baking import bake, make_key, push_base
from tests.fakes.memory import memory_tools
from tests.fakes.registry import fake_registry
from tests.unit.api.commands.conftest import Scene


def test_an_untouched_image_holds(scene: Scene) -> None:
    result = verify_image(scene.name, scene.public, scene.client, Silent())
    names = {one.name for one in result.checks}
    assert {"signature", "contents", "weights", "documents"} <= names
    verify_image(scene.name, None, scene.client, Silent())


def test_openssl_agrees_with_the_signature(scene: Scene) -> None:
    place = RegistryLocation(scene.client, Reference.parse(scene.name))
    (part,) = (
        part
        for blob, tag in place.attached(scene.image().digest)
        for part in place.read(blob, tag).parts
        if "simplesigning" in part.blob.media_type
    )
    (scene.folder / "payload").write_bytes(part.read())
    signature = base64.b64decode(part.annotations["dev.cosignproject.cosign/signature"])
    (scene.folder / "signature").write_bytes(signature)
    said = subprocess.run(
        ["openssl", "dgst", "-sha256", "-verify", scene.public,
         "-signature", scene.folder / "signature", scene.folder / "payload"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert "Verified OK" in said.stdout


def test_another_key(scene: Scene) -> None:
    _, other = make_key(scene.folder, "other")
    assert "none by this key" in scene.check(key=other)["signature"]


def test_signed_by_another_key(scene: Scene) -> None:
    key, _ = make_key(scene.folder, "other")
    name = f"{scene.fake.host}/team/theirs:1"
    bake(scene.client, scene.model, f"{scene.fake.host}/base/engine:1", key, push=name)
    assert {"signature", "statement provenance/v1"} <= set(scene.check(name))


def spoil(scene: Scene, digest: str, old: bytes, new: bytes) -> None:
    """Change bytes in the registry's own storage."""
    key = ("team/app", digest)
    assert old in scene.fake.blobs[key]
    scene.fake.blobs[key] = scene.fake.blobs[key].replace(old, new, 1)


def test_a_layer_changed_in_storage(scene: Scene) -> None:
    layer = scene.image().layers[1]
    spoil(scene, layer.digest, b"GGUF", b"EVIL")
    assert list(scene.check()) == ["layer 1", "weights"]


def test_the_configuration_changed_in_storage(scene: Scene) -> None:
    spoil(scene, scene.image().config_blob.digest, b"llamacpp", b"evilcpp!")
    assert list(scene.check()) == ["manifest or configuration (labels)"]


def retag(scene: Scene, image: Image, *, move: bool = True) -> None:
    """Push a changed image under the tag, with the old one's attachments where `move`."""
    before = scene.image()
    place = Reference.parse(scene.name)
    scene.client.push(image, place, force=True)
    if move:
        here = RegistryLocation(scene.client, place)
        for blob, tag in here.attached(before.digest):
            old = here.read(blob, tag)
            here.attach(replace(old.about(image.manifest_blob), tag=""))


def changed_label(scene: Scene) -> Image:
    old = scene.image()
    config = {**old.config, "Labels": {**old.labels, "dev.weightsmith.format": "f16"}}
    return replace(old, settings={**old.settings, "config": config}, raw=None)


def test_a_label_changed_under_the_tag(scene: Scene) -> None:
    retag(scene, changed_label(scene), move=False)
    found = scene.check()
    assert found["signature"] == "not signed"
    assert "statement" in found


def test_a_label_changed_and_everything_moved_along(scene: Scene) -> None:
    retag(scene, changed_label(scene))
    found = scene.check()
    assert "another image" in found["signature"]
    assert "labels or configuration" in found["statement"]
    assert "layer" not in found["statement"]


def test_a_layer_swapped_and_everything_moved_along(scene: Scene) -> None:
    old = scene.image()
    evil = TarLayer(members=(Member.of_bytes("models/tiny.gguf", b"evil"),), epoch=0)
    retag(scene, replace(old, layers=(old.layers[0], evil, *old.layers[2:]), raw=None))
    assert "layer 1" in scene.check()["statement"]


def test_a_statement_changed(scene: Scene) -> None:
    place = RegistryLocation(scene.client, Reference.parse(scene.name))
    image = scene.image()
    read = (place.read(blob, tag) for blob, tag in place.attached(image.digest))
    attachment = next(one for one in read if "dsse" in one.artifact_type)
    envelope = json.loads(attachment.parts[0].read())
    told = json.loads(base64.b64decode(envelope["payload"]))
    told["predicate"]["buildDefinition"]["externalParameters"]["target"] = "vllm"
    envelope["payload"] = base64.b64encode(json.dumps(told).encode()).decode()
    part = attachment.parts[0]
    evil = type(part).of_bytes(json.dumps(envelope).encode(), part.blob.media_type,
                               **part.annotations)  # fmt: skip
    place.attach(replace(attachment, parts=(evil,), raw=None))
    found = scene.check()
    assert "changed after signing" in found["statement provenance/v1"]
    assert "signature" not in found


def test_a_document_changed_in_storage(scene: Scene) -> None:
    digest = next(digest for (_, digest), data in scene.fake.blobs.items() if b"CycloneDX" in data)
    spoil(scene, digest, b"CycloneDX", b"Cycl0neDX")
    assert {"document model.cdx.json", "documents"} <= set(scene.check())


def test_a_document_taken_away(scene: Scene) -> None:
    image = scene.image()
    tag = f"sha256-{image.digest.hex}"
    kind, data = scene.fake.manifests["team/app", tag]
    index = json.loads(data)
    index["manifests"] = [r for r in index["manifests"] if "cyclonedx" not in r["artifactType"]]
    scene.fake.manifests["team/app", tag] = (kind, json.dumps(index).encode())
    assert scene.check() == {"documents": "missing or changed: model.cdx.json"}


def test_unsigned(scene: Scene) -> None:
    name = f"{scene.fake.host}/team/plain:1"
    bake(scene.client, scene.model, scene.base, push=name)
    verify_image(name, None, scene.client, Silent())
    assert scene.check(name)["signature"] == "not signed"


def test_what_is_not_there_is_not_a_failed_check(scene: Scene) -> None:
    for name, says in (
        (f"{scene.fake.host}/team/none:1", "404"),
        (f"oci:{scene.folder}/none", "none does not exist"),
        (f"oci:{scene.model}", "is not an OCI layout"),
    ):
        with pytest.raises(InputRefused, match=says):
            scene.check(name)
    with pytest.raises(UsageError, match=r"config\.json"):
        scene.check(key=scene.model / "config.json")


def test_an_image_in_an_index_without_platforms_is_checked(scene: Scene) -> None:
    """Platforms are left open by the specification; nothing but the index had been looked at."""
    image = scene.image()
    blob = image.manifest_blob
    row = {"mediaType": blob.media_type, "digest": blob.digest, "size": blob.size}
    document = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [row]}
    index = Reference.parse(f"{scene.fake.host}/team/app:index")
    scene.client.push_manifest(index, canonical(document), OCI_INDEX)
    result = verify_image(str(index), None, scene.client, Silent())
    assert "layer 0" in [one.name for one in result.checks]

    layer = image.layers[1].digest
    scene.fake.blobs["team/app", layer] = bytes(image.layers[1].size)
    with pytest.raises(CheckFailed, match="layer 1"):
        verify_image(str(index), None, scene.client, Silent())


def lying_index(scene: Scene, *platforms: str) -> str:
    """Push an index that lists the image under these platforms, each time under another digest."""
    rows = []
    for number, platform in enumerate(platforms):
        image = scene.image()
        data = canonical({**json.loads(image.manifest_bytes), "annotations": {"n": str(number)}})
        digest, (system, machine) = Digest.of(data), platform.split("/")
        scene.fake.manifests["team/app", digest] = (OCI_MANIFEST, data)
        where = {"os": system, "architecture": machine}
        row = {"mediaType": OCI_MANIFEST, "digest": digest, "size": len(data), "platform": where}
        rows.append(row)
    document = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": rows}
    index = f"{scene.fake.host}/team/app:index"
    scene.client.push_manifest(Reference.parse(index), canonical(document), OCI_INDEX)
    return index


@pytest.mark.parametrize(
    ("platforms", "says"),
    [
        (["linux/amd64", "linux/amd64"], "several images for linux/amd64"),
        (["linux/amd64", "linux/arm64"], "the index says linux/arm64, the image linux/amd64"),
    ],
)
def test_an_index_that_engines_read_otherwise(
    scene: Scene, platforms: list[str], says: str
) -> None:
    """Which of two images an engine takes is not said; and one is for another machine."""
    index = lying_index(scene, *platforms)
    with pytest.raises(CheckFailed) as caught:
        verify_image(index, None, scene.client, Silent())
    assert says in caught.value.message

    request = RebaseCommand(source=index, onto=scene.base, to=scene.name, smoke=False, force=True)
    with pytest.raises(InputRefused, match="linux/a"):
        rebase_image(request, memory_tools(scene.folder, registry=scene.client))


FORGED = "a\x1b[2K\n  ok  signature  signed by you"


def test_labels_that_cannot_be_read_are_reported_as_they_are() -> None:
    said = {
        "target": FORGED,
        "plan": "{",
        "score.base": "high",
        "score.adapter": "nan",
        "score.image": "0.5000 contains n=2",
    }
    own = {f"dev.weightsmith.{key}": text for key, text in said.items()}
    with fake_registry() as fake, Registry(pause=lambda _: None) as client:
        name = f"{fake.host}/odd/labels:1"
        push_base(client, name, own, {"a": b"1"}, platform=host_platform())
        found = inspect_image(name, client, DockerEngine())
    assert found["scores"] == {"image": 0.5}
    assert found["plan"] == {}
    assert found["provenance"] == {k: said[k] for k in said if k != "score.image"}
    assert json.dumps(plain(found), allow_nan=False)
    text = inspect_text(found)
    assert "\x1b" not in text
    assert not [row for row in text.splitlines() if row.startswith("  ok")]


def test_a_plan_that_lacks_what_is_printed_of_it() -> None:
    for plan in ({}, {"device": "cpu"}, {"max_num_seqs": 1, "max_model_len": 2, "device": "cpu"}):
        found = {"reference": "r", "digest": "d", "scores": {}, "provenance": {}, "plan": plan}
        assert ("serves 1 requests" in inspect_text({**found, "layers": []})) == (len(plan) == 3)


def test_a_layers_name_adds_no_row_to_what_was_verified() -> None:
    (row,) = table([Check(name="layer 0", ok=False, found=FORGED)]).splitlines()
    assert row.startswith("  NO  layer 0")
    assert "\x1b" not in row
