"""An image is what it is stated to be, or `verify` says what of it is not."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from weightsmith.commands.images import copy_attachments, copy_image
from weightsmith.commands.verify import verify_image
from weightsmith.drivers.signer import open_signer
from weightsmith.errors import CheckFailed, InputRefused, UsageError
from weightsmith.oci.attachments import fallback_tag
from weightsmith.oci.image import Image
from weightsmith.oci.layers import Member, TarLayer
from weightsmith.oci.locations import RegistryLocation
from weightsmith.oci.manifests import OCI_INDEX
from weightsmith.oci.references import Reference
from weightsmith.oci.registry import Registry
from weightsmith.ports import Silent
from weightsmith.values import canonical

from tests.fakes.baking import bake, make_key, make_model, push_base
from tests.fakes.debian_registry import real_registry
from tests.fakes.registry import FakeRegistry, fake_registry

ENGINE = {"dev.weightsmith.engine": "llamacpp", "org.opencontainers.image.version": "1.0.0"}


@dataclass
class Scene:
    fake: FakeRegistry
    client: Registry
    model: Path
    key: Path
    public: Path
    folder: Path

    @property
    def name(self) -> str:
        return f"{self.fake.host}/team/app:1"

    def check(self, name: str = "", key: Path | None = None) -> dict[str, str]:
        """Return what does not hold: check -> what was found; {} where all does."""
        try:
            verify_image(name or self.name, key or self.public, self.client, Silent())
        except CheckFailed as error:
            rows = error.details["checks"]
            return {row["check"]: row["found"] for row in rows if row["ok"] is False}
        return {}

    def image(self) -> Image:
        return self.client.pull(Reference.parse(self.name), platform="linux/amd64")


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    monkeypatch.setenv("WEIGHTSMITH_STORE", str(tmp_path / "store"))
    key, public = make_key(tmp_path)
    with fake_registry() as fake, Registry(pause=lambda _: None) as client:
        push_base(client, f"{fake.host}/base/engine:1", ENGINE, {"app/llama-server": b"1"})
        made = Scene(fake, client, make_model(tmp_path / "model"), key, public, tmp_path)
        bake(client, made.model, f"{fake.host}/base/engine:1", key, push=made.name)
        yield made


def test_an_untouched_image_holds(scene: Scene) -> None:
    result = verify_image(scene.name, scene.public, scene.client, Silent())
    assert result["ok"]
    assert {"signature", "contents", "weights", "documents"} <= {
        row["check"] for row in result["checks"]
    }
    assert verify_image(scene.name, None, scene.client, Silent())["ok"]


def test_openssl_agrees_with_the_signature(scene: Scene) -> None:
    place = RegistryLocation(scene.client, Reference.parse(scene.name))
    parts = [
        part
        for blob, tag in place.attached(scene.image().digest)
        for part in place.read(blob, tag).parts
        if "simplesigning" in part.blob.media_type
    ]
    (part,) = parts
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


def retag(scene: Scene, image: Image, *, move: bool) -> None:
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


def swapped_layer(scene: Scene) -> Image:
    old = scene.image()
    evil = TarLayer(members=(Member.of_bytes("models/tiny.gguf", b"evil"),), epoch=0)
    return replace(old, layers=(old.layers[0], evil, *old.layers[2:]), raw=None)


def test_a_label_changed_under_the_tag(scene: Scene) -> None:
    retag(scene, changed_label(scene), move=False)
    found = scene.check()
    assert found["signature"] == "not signed"
    assert "statement" in found


def test_a_label_changed_and_everything_moved_along(scene: Scene) -> None:
    retag(scene, changed_label(scene), move=True)
    found = scene.check()
    assert "another image" in found["signature"]
    assert "labels or configuration" in found["statement"]
    assert "layer" not in found["statement"]


def test_a_layer_swapped_and_everything_moved_along(scene: Scene) -> None:
    retag(scene, swapped_layer(scene), move=True)
    assert "layer 1" in scene.check()["statement"]


def test_a_statement_changed(scene: Scene) -> None:
    place = RegistryLocation(scene.client, Reference.parse(scene.name))
    image = scene.image()
    rows = [
        (blob, tag)
        for blob, tag in place.attached(image.digest)
        if "dsse" in place.read(blob, tag).artifact_type
    ]
    attachment = place.read(*rows[0])
    envelope = json.loads(attachment.parts[0].read())
    told = json.loads(base64.b64decode(envelope["payload"]))
    told["predicate"]["buildDefinition"]["externalParameters"]["target"] = "vllm"
    envelope["payload"] = base64.b64encode(json.dumps(told).encode()).decode()
    part = replace(attachment.parts[0])
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


def test_what_is_copied_still_holds(scene: Scene, tmp_path: Path) -> None:
    other = f"{scene.fake.host}/prod/app:1"
    copied = copy_image(scene.name, other, scene.client, Silent(), force=False)
    assert copied["mounted"] == 4
    assert copied["uploaded_bytes"] == scene.image().config_blob.size
    assert scene.check(other) == {}


def test_a_layout_holds_and_is_pushed_with_all_that_hangs_on_it(
    scene: Scene, tmp_path: Path
) -> None:
    layout = tmp_path / "layout"
    base = f"{scene.fake.host}/base/engine:1"
    made = bake(scene.client, scene.model, base, scene.key, layout=layout)
    assert made["digest"] == scene.image().digest
    assert scene.check(f"oci:{layout}") == {}
    other = f"{scene.fake.host}/prod/app:2"
    copy_image(str(layout), other, scene.client, Silent(), force=False)
    assert scene.check(other) == {}
    blob = layout / "blobs" / "sha256" / scene.image().layers[1].digest.hex
    blob.write_bytes(blob.read_bytes().replace(b"GGUF", b"EVIL"))
    assert "layer 1" in scene.check(f"oci:{layout}")


@pytest.mark.parametrize("how", ["plain", "signed", "made"])
def test_an_attachment_that_a_registry_lost_is_sent_again_by_force(scene: Scene, how: str) -> None:
    """That is by whatever command has brought it there: `push` of an image, `bake` and `build`."""
    base = f"{scene.fake.host}/base/engine:1"
    key = None if how == "plain" else scene.key
    source, other = f"{scene.fake.host}/team/lost:1", f"{scene.fake.host}/prod/app:1"
    bake(scene.client, scene.model, base, key, push=source)

    def send(*, force: bool) -> None:
        if how == "made":
            bake(scene.client, scene.model, base, key, push=other, force=force)
        else:
            copy_image(source, other, scene.client, Silent(), force=force)

    send(force=False)
    held = scene.fake.manifests
    hung = [at for at, (_, data) in held.items() if at[0] == "prod/app" and b'"subject"' in data]
    gone = {at: held.pop(at) for at in hung if at[1].startswith("sha256:")}
    assert gone
    if how == "plain":
        send(force=False)  # it is listed, so it is not looked for
        assert not gone.keys() & held.keys()
    send(force=True)
    assert gone.keys() <= held.keys()


def test_unsigned(scene: Scene) -> None:
    name = f"{scene.fake.host}/team/plain:1"
    base = f"{scene.fake.host}/base/engine:1"
    bake(scene.client, scene.model, base, push=name)
    assert verify_image(name, None, scene.client, Silent())["ok"]
    assert scene.check(name)["signature"] == "not signed"


def test_what_is_not_there_is_not_a_failed_check(scene: Scene) -> None:
    with pytest.raises(InputRefused, match="404"):
        scene.check(f"{scene.fake.host}/team/none:1")
    with pytest.raises(UsageError, match=r"config\.json"):
        scene.check(key=scene.model / "config.json")
    with pytest.raises(InputRefused, match="is not an OCI layout"):
        scene.check(f"oci:{scene.folder}/none")


def test_the_same_again_adds_nothing(scene: Scene) -> None:
    before = set(scene.fake.blobs) | {("m", *key) for key in scene.fake.manifests}
    base = f"{scene.fake.host}/base/engine:1"
    bake(scene.client, scene.model, base, scene.key, push=scene.name)
    assert set(scene.fake.blobs) | {("m", *key) for key in scene.fake.manifests} == before


@pytest.mark.registry
@pytest.mark.skipif(not shutil.which("cosign"), reason="cosign is not installed")
def test_cosign_agrees(scene: Scene, tmp_path: Path) -> None:
    with real_registry(tmp_path) as host:
        name = f"{host}/real/app:1"
        copy_image(scene.name, name, scene.client, Silent(), force=False)
        assert scene.check(name) == {}
        flags = ["--key", str(scene.public), "--insecure-ignore-tlog=true",
                 "--private-infrastructure", "--allow-http-registry", name]  # fmt: skip
        for words in (["verify"], ["verify-attestation", "--type", "slsaprovenance1"]):
            subprocess.run(["cosign", *words, *flags], check=True, capture_output=True)
        if shutil.which("oras"):
            told = subprocess.run(
                ["oras", "discover", "--plain-http", "--format", "json", name],
                check=True, capture_output=True, text=True,
            )  # fmt: skip
            found = json.loads(told.stdout)
            # As oras calls them since 1.3, and before.
            rows = found.get("referrers") or found["manifests"]
            kinds = {row["artifactType"] for row in rows}
            assert {
                "application/vnd.cyclonedx+json",
                "application/vnd.dsse.envelope.v1+json",
            } <= kinds


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("cosign"), reason="cosign is not installed")
def test_a_key_of_cosigns_own_and_a_signature_by_cosign(
    scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COSIGN_PASSWORD", "pa55")
    subprocess.run(["cosign", "generate-key-pair"], check=True, capture_output=True, cwd=tmp_path)
    name = f"{scene.fake.host}/team/own:1"
    base = f"{scene.fake.host}/base/engine:1"
    bake(scene.client, scene.model, base, tmp_path / "cosign.key", push=name)
    assert scene.check(name, tmp_path / "cosign.pub") == {}
    # Its signatures differ each time, so that what it signed already has to be known again.
    before = set(scene.fake.blobs), set(scene.fake.manifests)
    bake(scene.client, scene.model, base, tmp_path / "cosign.key", push=name)
    assert (set(scene.fake.blobs), set(scene.fake.manifests)) == before


def test_attachments_are_copied_once(scene: Scene) -> None:
    place = Reference.parse(f"{scene.fake.host}/other/app:1")
    here = RegistryLocation(scene.client, Reference.parse(scene.name))
    there = RegistryLocation(scene.client, place)
    digest = scene.image().digest
    scene.client.push(scene.image(), place)
    for _ in range(2):
        copy_attachments(scene.image().manifest_blob, here, there, None)
    assert len(there.attached(digest)) == len(here.attached(digest))


def test_a_copy_is_signed_at_its_new_place(scene: Scene, tmp_path: Path) -> None:
    """By a key of its own; who signed before is still believed, and again adds nothing."""
    layout = tmp_path / "layout"
    base = f"{scene.fake.host}/base/engine:1"
    bake(scene.client, scene.model, base, layout=layout)
    key, public = make_key(tmp_path, "release")
    for source, others in ((str(layout), ()), (scene.name, (scene.public,))):
        name = f"{scene.fake.host}/prod/app:{len(others)}"
        for _ in range(2):
            copy_image(
                source, name, scene.client, Silent(), force=False, signer=open_signer(str(key))
            )
            for one in (public, *others):
                assert scene.check(name, one) == {}
        before = set(scene.fake.blobs), set(scene.fake.manifests)
        copy_image(source, name, scene.client, Silent(), force=False, signer=open_signer(str(key)))
        assert (set(scene.fake.blobs), set(scene.fake.manifests)) == before
    _, stranger = make_key(tmp_path, "stranger")
    assert {"signature", "statement provenance/v1"} <= set(scene.check(name, stranger))


def test_who_signed_an_image_before_is_still_believed(scene: Scene) -> None:
    """Baked once more with another key; with a key that signed already, nothing is added."""
    key, public = make_key(scene.folder, "other")
    base = f"{scene.fake.host}/base/engine:1"
    bake(scene.client, scene.model, base, key, push=scene.name)
    for one in (scene.public, public):
        assert scene.check(key=one) == {}
    before = set(scene.fake.blobs), set(scene.fake.manifests)
    for one in (scene.key, key):
        bake(scene.client, scene.model, base, one, push=scene.name)
    assert (set(scene.fake.blobs), set(scene.fake.manifests)) == before


def test_a_copy_without_a_key_leaves_the_signatures_at_its_new_place(scene: Scene) -> None:
    key, public = make_key(scene.folder, "other")
    name = f"{scene.fake.host}/prod/app:1"
    bake(scene.client, scene.model, f"{scene.fake.host}/base/engine:1", key, push=name)
    copy_image(scene.name, name, scene.client, Silent(), force=False)
    tag = f"{scene.fake.host}/prod/app:{fallback_tag(scene.image().digest, '.sig')}"
    body, _ = scene.client.read_manifest(Reference.parse(tag))
    assert len(json.loads(body)["layers"]) == 2
    for one in (scene.public, public):
        assert scene.check(name, one) == {}


@pytest.mark.registry
@pytest.mark.skipif(not shutil.which("cosign"), reason="cosign is not installed")
def test_cosign_reads_every_signature(scene: Scene, tmp_path: Path) -> None:
    """Of two keys that an image was baked with, and of the one that it was pushed with."""
    (second, _), (release, _) = make_key(tmp_path, "second"), make_key(tmp_path, "release")
    with real_registry(tmp_path) as host:
        name = f"{host}/real/app:1"

        def believed(key: Path) -> bool:
            flags = ["--key", key.with_suffix(".pub"), "--insecure-ignore-tlog=true",
                     "--private-infrastructure", "--allow-http-registry", name]  # fmt: skip
            asked = (["verify"], ["verify-attestation", "--type", "slsaprovenance1"])
            said = [subprocess.run(["cosign", *a, *flags], capture_output=True) for a in asked]
            return all(answer.returncode == 0 for answer in said)

        for one in (scene.key, second):
            bake(scene.client, scene.model, f"{scene.fake.host}/base/engine:1", one, push=name)
        assert believed(scene.key)
        assert believed(second)
        assert not believed(release)
        signer = open_signer(str(release))
        copy_image(name, name, scene.client, Silent(), force=False, signer=signer)
        assert all(map(believed, (scene.key, second, release)))


def test_an_image_in_an_index_without_platforms_is_checked(scene: Scene) -> None:
    """Platforms are left open by the specification; nothing but the index had been looked at."""
    image = scene.image()
    blob = image.manifest_blob
    row = {"mediaType": blob.media_type, "digest": blob.digest, "size": blob.size}
    document = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [row]}
    index = Reference.parse(f"{scene.fake.host}/team/app:index")
    scene.client.push_manifest(index, canonical(document), OCI_INDEX)
    result = verify_image(str(index), None, scene.client, Silent())
    assert "layer 0" in [one["check"] for one in result["checks"]]

    layer = image.layers[1].digest
    scene.fake.blobs["team/app", layer] = bytes(image.layers[1].size)
    with pytest.raises(CheckFailed, match="layer 1"):
        verify_image(str(index), None, scene.client, Silent())
