"""Bills of materials of a base go along with the image, however its makers left them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from weightsmith.api.commands.verify import verify_image
from weightsmith.core.ports import Silent
from weightsmith.core.values import Blob, Digest, canonical
from weightsmith.oci.attachments import Attachment, AttachmentPart
from weightsmith.oci.image import Image
from weightsmith.oci.manifests import described
from weightsmith.oci.references import Reference
from weightsmith.oci.registry import Registry
from weightsmith.provenance.bills import read_bills

from tests.fakes.baking import bake, make_key, make_model, push_base
from tests.fakes.registry import fake_registry

INDEX, MANIFEST, CONFIG = (
    f"application/vnd.oci.image.{what}.v1+json" for what in ("index", "manifest", "config")
)
SPDX, CYCLONEDX = "application/spdx+json", "application/vnd.cyclonedx+json"
BILL = b'{"spdxVersion":"SPDX-2.3"}'


@dataclass
class Base:
    client: Registry
    place: Reference
    image: Image

    def attach(self, data: bytes) -> None:
        """Attach a bill, as `oras attach` and syft do."""
        part = AttachmentPart.of_bytes(data, CYCLONEDX)
        self.client.attach(
            self.place,
            Attachment(artifact_type=CYCLONEDX, subject=self.image.manifest_blob, parts=(part,)),
        )

    def state(self, statement: bytes, about: str = "") -> Reference:
        """Push an index as `docker buildx build --sbom=true` does; return its name."""
        kind, predicate = "application/vnd.in-toto+json", "in-toto.io/predicate-type"
        parts = [
            AttachmentPart.of_bytes(b"{}", CONFIG),
            AttachmentPart.of_bytes(statement, kind, **{predicate: "https://spdx.dev/Document"}),
            AttachmentPart.of_bytes(
                b'{"predicate":{}}', kind, **{predicate: "https://slsa.dev/provenance/v1"}
            ),
        ]
        config, *layers = [described(part.blob, part.annotations) for part in parts]
        document = {"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": layers}
        told = canonical(document)
        bare = Reference(self.place.registry, self.place.repository)
        self.client.push_manifest(bare, told, MANIFEST, [(p.blob, p.open) for p in parts])
        notes = {"vnd.docker.reference.type": "attestation-manifest",
                 "vnd.docker.reference.digest": about or self.image.digest}  # fmt: skip
        blob = Blob(digest=Digest.of(told), size=len(told), media_type=MANIFEST)
        here = {"platform": {"os": "linux", "architecture": "amd64"}}
        nowhere = {"platform": {"os": "unknown", "architecture": "unknown"}}
        rows = [described(self.image.manifest_blob) | here, described(blob, notes) | nowhere]
        index = canonical({"schemaVersion": 2, "mediaType": INDEX, "manifests": rows})
        name = Reference(self.place.registry, self.place.repository, "stated")
        self.client.push_manifest(name, index, INDEX)
        return name

    def bills(self, place: Reference) -> list[tuple[str, bytes]]:
        found = read_bills(place, self.image, self.client)
        return [(document.artifact_type, document.parts[0].read()) for document in found]


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Base]:
    monkeypatch.setenv("WEIGHTSMITH_STORE", str(tmp_path / "store"))
    with fake_registry() as fake, Registry(pause=lambda _: None) as client:
        place = Reference.parse(f"{fake.host}/base/engine:1")
        push_base(client, str(place), {"dev.weightsmith.engine": "llamacpp"}, {"app/x": b"1"})
        yield Base(client, place, client.pull(place, platform="linux/amd64"))


def test_attached_and_stated_ones_are_signed_with_the_image(base, tmp_path):
    key, public = make_key(tmp_path)
    assert base.bills(base.place) == []
    base.attach(b'{"bomFormat":"CycloneDX"}')
    place = base.state(b'{"predicateType":"https://spdx.dev/Document","predicate":%s}' % BILL)
    assert base.bills(place) == [(CYCLONEDX, b'{"bomFormat":"CycloneDX"}'), (SPDX, BILL)]

    name = f"{place.registry}/team/app:1"
    bake(base.client, make_model(tmp_path / "model"), str(place), key, push=name)
    rows = verify_image(name, public, base.client, Silent())["checks"]
    (documents,) = [row for row in rows if row["check"].endswith("documents")]
    assert documents["ok"]
    assert {"base.spdx.json", CYCLONEDX} <= set(documents["found"].split(", "))


def test_a_base_of_ours_has_a_bill_of_another_model(base, tmp_path):
    first, second = (f"{base.place.registry}/team/app:{number}" for number in "12")
    model = make_model(tmp_path / "model")
    bake(base.client, model, str(base.place), push=first)
    (model / "tiny.gguf").write_bytes(b"GGUF" + bytes(1000))
    bake(base.client, model, first, push=second)
    rows = verify_image(second, None, base.client, Silent())["checks"]
    (documents,) = [row for row in rows if row["check"].endswith("documents")]
    assert (documents["ok"], documents["found"]) == (True, "model.cdx.json")
    assert not [row for row in rows if row["check"].startswith("document model")]


@pytest.mark.parametrize("statement", [b"[]", b"no JSON", b'{"predicate":[]}', b"{}"])
def test_a_statement_that_says_nothing_is_no_bill(base, statement):
    base.attach(BILL)
    assert base.bills(base.state(statement)) == [(CYCLONEDX, BILL)]


def test_of_another_image_is_none_of_ours(base):
    statement = json.dumps({"predicate": {"spdxVersion": "SPDX-2.3"}}).encode()
    assert base.bills(base.state(statement, about=Digest.of(b"another"))) == []
