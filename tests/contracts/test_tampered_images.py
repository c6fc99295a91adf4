"""A tampered image in a real registry: `verify` exits with 4 and says what of it is not right.

cosign is the other judge where it is installed.
"""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from weightsmith.core.values import Digest, canonical
from weightsmith.oci.attachments import AttachmentPart, fallback_tag
from weightsmith.oci.image import Image
from weightsmith.oci.references import Reference
from weightsmith.oci.registry import Registry
from weightsmith.provenance import signing

from tests.fakes.baking import bake, make_key, make_model, push_base
from tests.fakes.command_line import weightsmith
from tests.fakes.debian_registry import real_registry

pytestmark = [
    pytest.mark.registry,
    pytest.mark.skipif(not shutil.which("docker-registry"), reason="no docker-registry"),
]


@dataclass
class Scene:
    host: str
    client: Registry
    folder: Path
    public: Path

    @property
    def name(self) -> str:
        return f"{self.host}/team/app:1"

    @property
    def place(self) -> Reference:
        return Reference.parse(self.name)

    def image(self) -> Image:
        return self.client.pull(self.place, platform="linux/amd64")

    def verify(self, key: Path | None = None) -> tuple[int, dict[str, str]]:
        """Return the exit code, and what does not hold."""
        done = weightsmith("verify", self.name, "--json", "--key", key or self.public)
        rows = json.loads(done.out)["checks"]
        return done.code, {r["check"]: r["found"] for r in rows if r["ok"] is False}

    def cosign(self, *words: str, key: Path | None = None) -> bool:
        """Say whether cosign believes the same."""
        flags = ["--key", key or self.public, "--insecure-ignore-tlog=true",
                 "--private-infrastructure", "--allow-http-registry", self.name]  # fmt: skip
        return subprocess.run(["cosign", *words, *flags], capture_output=True).returncode == 0

    def stored(self, digest: Digest) -> Path:
        """Return the file that the registry keeps a blob in."""
        blobs = self.folder / "data" / "docker" / "registry" / "v2" / "blobs" / "sha256"
        return blobs / digest.hex[:2] / digest.hex / "data"


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    monkeypatch.setenv("WEIGHTSMITH_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("WEIGHTSMITH_CACHE", str(tmp_path / "cache"))
    key, public = make_key(tmp_path)
    with real_registry(tmp_path) as host, Registry() as client:
        base = f"{host}/base/engine:1"
        push_base(client, base, {"dev.weightsmith.engine": "llamacpp"}, {"app/x": b"1"})
        made = Scene(host, client, tmp_path, public)
        bake(client, make_model(tmp_path / "model"), base, key, push=made.name)
        assert made.verify() == (0, {})
        yield made


def test_a_layer_whose_bytes_were_swapped(scene: Scene) -> None:
    blob = scene.stored(scene.image().layers[1].digest)
    blob.write_bytes(blob.read_bytes().replace(b"GGUF", b"EVIL"))
    code, bad = scene.verify()
    assert code == 4
    assert set(bad) == {"layer 1", "weights"}


def test_a_manifest_with_another_layer(scene: Scene) -> None:
    """What a mirror could do: another layer, and a manifest that names it rightly."""
    image = scene.image()
    other = bake(
        scene.client,
        _other_model(scene.folder / "other"),
        f"{scene.host}/base/engine:1",
        push=f"{scene.host}/team/app:2",
    )
    layer = scene.client.pull(Reference.parse(f"{scene.host}/team/app:2")).layers[1]
    assert other["layers"][1]["digest"] == layer.digest
    _push_changed(scene, replace(image, layers=(image.layers[0], layer, *image.layers[2:])))
    code, bad = scene.verify()
    assert code == 4
    assert {"signature", "statement"} <= set(bad)
    if shutil.which("cosign"):
        assert not scene.cosign("verify")


def test_a_changed_label(scene: Scene) -> None:
    image = scene.image()
    labels = {**image.labels, "dev.weightsmith.score.image": "1.0000 contains n=33"}
    settings = {**image.settings, "config": {**image.config, "Labels": labels}}
    # The attacker brings what hangs on the true image along.
    attached = [
        scene.client.read_attachment(scene.place, blob, tag)
        for blob, tag in scene.client.attached(scene.place, image.digest)
    ]
    changed = _push_changed(scene, replace(image, settings=settings))
    for attachment in attached:
        about = attachment.about(changed.manifest_blob)
        tag = fallback_tag(changed.digest, Path(attachment.tag).suffix) if attachment.tag else ""
        scene.client.attach(scene.place, replace(about, tag=tag))
    code, bad = scene.verify()
    assert code == 4
    assert "for another image" in bad["signature"]
    assert "labels or configuration" in bad["statement"]
    if shutil.which("cosign"):
        assert not scene.cosign("verify")


def test_a_changed_statement(scene: Scene) -> None:
    image = scene.image()
    tag = fallback_tag(image.digest, ".att")
    place = Reference.parse(f"{scene.place.name}:{tag}")
    blob = next(b for b, t in scene.client.attached(scene.place, image.digest) if t == tag)
    held = scene.client.read_attachment(place, blob, tag)
    envelope = json.loads(held.parts[0].read())
    told = json.loads(base64.b64decode(envelope["payload"]))
    told["predicate"]["buildDefinition"]["externalParameters"]["target"] = "another"
    envelope["payload"] = base64.b64encode(canonical(told)).decode()
    part = signing.envelope_part(canonical(envelope), str(told["predicateType"]))
    parts: tuple[AttachmentPart, ...] = (part, *held.parts[1:])
    _forget_attachments(scene, image)
    forged = signing.cosign_manifest(parts, image.manifest_blob, held.artifact_type, tag)
    scene.client.attach(scene.place, forged)
    code, bad = scene.verify()
    assert code == 4
    assert "changed after signing" in bad["statement provenance/v1"]
    if shutil.which("cosign"):
        assert not scene.cosign("verify-attestation", "--type", "slsaprovenance1")


def test_another_key(scene: Scene) -> None:
    _, other = make_key(scene.folder, "other")
    code, bad = scene.verify(other)
    assert code == 4
    assert "none by this key" in bad["signature"]
    if shutil.which("cosign"):
        assert scene.cosign("verify")
        assert not scene.cosign("verify", key=other)


def _other_model(folder: Path) -> Path:
    made = make_model(folder)
    (made / "tiny.gguf").write_bytes(b"GGUF" + bytes(40_000))
    return made


def _push_changed(scene: Scene, image: Image) -> Image:
    """Push an image with what was changed in it, under the same tag."""
    changed = replace(image, raw=None)
    scene.client.push(changed, scene.place, force=True)
    return changed


def _forget_attachments(scene: Scene, image: Image) -> None:
    """Empty the list of referrers, which a registry's owner can do."""
    kind = "application/vnd.oci.image.index.v1+json"
    empty = canonical({"schemaVersion": 2, "mediaType": kind, "manifests": []})
    place = Reference.parse(f"{scene.place.name}:{fallback_tag(image.digest)}")
    scene.client.push_manifest(place, empty, kind)
