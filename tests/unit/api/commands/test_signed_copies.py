"""What hangs on an image goes with its copies, and every signer is still believed."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from weightsmith.api.commands.images import copy_image, preview_copy
from weightsmith.api.commands.verify import verify_image
from weightsmith.core.errors import CheckFailed, UsageError
from weightsmith.core.ports import Silent
from weightsmith.oci.attachments import fallback_tag
from weightsmith.oci.references import Reference
from weightsmith.outside.signer import open_signer

from tests.fakes.baking import bake, make_key
from tests.fakes.real_registries import real_registry
from tests.unit.api.commands.conftest import Scene


def test_a_layout_holds_and_is_pushed_with_all_that_hangs_on_it(
    scene: Scene, tmp_path: Path
) -> None:
    layout = tmp_path / "layout"
    made = bake(scene.client, scene.model, scene.base, scene.key, layout=layout)
    assert made.digest == scene.image().digest
    assert scene.check(f"oci:{layout}") == {}
    other = f"{scene.fake.host}/prod/app:2"
    copy_image(str(layout), other, scene.client, Silent(), force=False)
    assert scene.check(other) == {}
    listed = json.loads((layout / "referrers.json").read_bytes())["manifests"]
    spare = tmp_path / "spare"
    shutil.copytree(layout, spare)
    for row in listed:
        (spare / "blobs" / "sha256" / row["digest"].removeprefix("sha256:")).unlink()
    found = scene.check(f"oci:{spare}")["attachments"]
    assert f"{len(listed)} of {len(listed)} attachments" in found
    assert "umoci gc" in found
    (spare / "referrers.json").unlink()
    with pytest.raises(CheckFailed, match="oras copy -r"):
        verify_image(f"oci:{spare}", None, scene.client, Silent())
    blob = layout / "blobs" / "sha256" / scene.image().layers[1].digest.hex
    blob.write_bytes(blob.read_bytes().replace(b"GGUF", b"EVIL"))
    assert "layer 1" in scene.check(f"oci:{layout}")


def test_a_dry_run_shows_what_would_be_copied(scene: Scene) -> None:
    other = f"{scene.fake.host}/prod/app:1"
    before = (dict(scene.fake.blobs), dict(scene.fake.manifests))
    shown, text = preview_copy(scene.name, other, scene.client, force=False)
    assert (scene.fake.blobs, scene.fake.manifests) == before
    assert [row["how"] for row in shown["blobs"]] == [*["mount"] * 5, "send"]
    assert shown["uploaded_bytes"] == scene.image().config_blob.size
    assert shown["attached"] == 3
    assert "3 attachments" in text

    copied = copy_image(scene.name, other, scene.client, Silent(), force=False)
    assert (copied.mounted, copied.uploaded_bytes) == (5, shown["uploaded_bytes"])
    assert scene.check(other) == {}
    before = dict(scene.fake.manifests)
    copy_image(scene.name, other, scene.client, Silent(), force=True)
    assert scene.fake.manifests == before
    shown, _ = preview_copy(scene.name, other, scene.client, force=False)
    assert {row["how"] for row in shown["blobs"]} == {"there"}
    assert (shown["digest"], shown["uploaded_bytes"]) == (scene.image().digest, 0)
    bake(scene.client, scene.model, "", kind="volume", push=f"{scene.fake.host}/team/other:1")
    with pytest.raises(UsageError, match="already exists"):
        preview_copy(f"{scene.fake.host}/team/other:1", other, scene.client, force=False)
    assert preview_copy(f"{scene.fake.host}/team/other:1", other, scene.client, force=True)


@pytest.mark.parametrize("how", ["plain", "signed", "made"])
def test_an_attachment_that_a_registry_lost_is_sent_again_by_force(scene: Scene, how: str) -> None:
    """That is by whatever command has brought it there: `push` of an image, `bake` and `build`."""
    key = None if how == "plain" else scene.key
    source, other = f"{scene.fake.host}/team/lost:1", f"{scene.fake.host}/prod/app:1"
    bake(scene.client, scene.model, scene.base, key, push=source)

    def send(*, force: bool) -> None:
        if how == "made":
            bake(scene.client, scene.model, scene.base, key, push=other, force=force)
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


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("cosign"), reason="cosign is not installed")
def test_a_key_of_cosigns_own_and_a_signature_by_cosign(
    scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COSIGN_PASSWORD", "pa55")
    subprocess.run(["cosign", "generate-key-pair"], check=True, capture_output=True, cwd=tmp_path)
    name = f"{scene.fake.host}/team/own:1"
    bake(scene.client, scene.model, scene.base, tmp_path / "cosign.key", push=name)
    assert scene.check(name, tmp_path / "cosign.pub") == {}
    # Its signatures differ each time, so that what it signed already has to be known again.
    before = set(scene.fake.blobs), set(scene.fake.manifests)
    bake(scene.client, scene.model, scene.base, tmp_path / "cosign.key", push=name)
    assert (set(scene.fake.blobs), set(scene.fake.manifests)) == before


def test_a_copy_is_signed_at_its_new_place(scene: Scene, tmp_path: Path) -> None:
    """By a key of its own; who signed before is still believed, and again adds nothing."""
    layout = tmp_path / "layout"
    bake(scene.client, scene.model, scene.base, layout=layout)
    key, public = make_key(tmp_path, "release")
    for source, others in ((str(layout), ()), (scene.name, (scene.public,))):
        name = f"{scene.fake.host}/prod/app:{len(others)}"
        for _ in range(2):
            before = set(scene.fake.blobs), set(scene.fake.manifests)
            signer = open_signer(str(key))
            copy_image(source, name, scene.client, Silent(), force=False, signer=signer)
            for one in (public, *others):
                assert scene.check(name, one) == {}
        assert (set(scene.fake.blobs), set(scene.fake.manifests)) == before
    _, stranger = make_key(tmp_path, "stranger")
    assert {"signature", "statement provenance/v1"} <= set(scene.check(name, stranger))


def test_who_signed_an_image_before_is_still_believed(scene: Scene) -> None:
    """Baked once more with another key; with a key that signed already, nothing is added."""
    key, public = make_key(scene.folder, "other")
    bake(scene.client, scene.model, scene.base, key, push=scene.name)
    for one in (scene.public, public):
        assert scene.check(key=one) == {}
    before = set(scene.fake.blobs), set(scene.fake.manifests)
    for one in (scene.key, key):
        bake(scene.client, scene.model, scene.base, one, push=scene.name)
    assert (set(scene.fake.blobs), set(scene.fake.manifests)) == before


def test_a_copy_without_a_key_leaves_the_signatures_at_its_new_place(scene: Scene) -> None:
    key, public = make_key(scene.folder, "other")
    name = f"{scene.fake.host}/prod/app:1"
    bake(scene.client, scene.model, scene.base, key, push=name)
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
            bake(scene.client, scene.model, scene.base, one, push=name)
        assert believed(scene.key)
        assert believed(second)
        assert not believed(release)
        signer = open_signer(str(release))
        copy_image(name, name, scene.client, Silent(), force=False, signer=signer)
        assert all(map(believed, (scene.key, second, release)))
