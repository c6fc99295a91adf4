"""Bills of materials: what ours say, the same every time; a base's own go along with the image."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from weightsmith.api.commands.verify import verify_image
from weightsmith.core.ports import Silent
from weightsmith.core.resources import engine_source
from weightsmith.core.values import Blob, Digest, FileEntry, Json, Score, canonical
from weightsmith.oci.attachments import Attachment, AttachmentPart
from weightsmith.oci.image import Image
from weightsmith.oci.manifests import described
from weightsmith.oci.references import Reference
from weightsmith.oci.registry import Registry
from weightsmith.provenance.bills import (
    Ancestor,
    BilledModel,
    engine_bom,
    license_of,
    ml_bom,
    read_bills,
)
from weightsmith.recipe.schema import Card

from tests.fakes.baking import bake, gguf_of, make_key, make_model, push_base
from tests.fakes.registry import fake_registry

DIGEST = Digest.of(b"x")


def facts(**more: Json) -> BilledModel:
    given: dict[str, Json] = {
        "name": "bot",
        "version": "1.2.0",
        "digest": DIGEST,
        "files": [FileEntry(path="m.gguf", size=1, digest=DIGEST)],
        "format": "q4_k_m",
        "model_type": "llama",
        "architecture": "LlamaForCausalLM",
        "license": "apache-2.0",
        "ancestors": [
            Ancestor(name="base", pin="hf://a/b@c", digest=DIGEST, license="apache-2.0"),
            Ancestor(name="v3", pin="sha", digest=DIGEST, version="v3", license="llama3"),
        ],
        "scores": {"image": Score(score=0.97, n=33, metric="contains")},
        "card": Card(description="Answers.", intended_use="Support.", limitations="English."),
        **more,
    }
    return BilledModel(**given)


def test_what_it_says():
    bill = ml_bom(facts())
    model = bill["metadata"]["component"]
    assert model["type"] == "machine-learning-model"
    assert model["licenses"] == [{"license": {"id": "Apache-2.0"}}]
    assert [a["name"] for a in model["pedigree"]["ancestors"]] == ["base", "v3"]
    assert model["pedigree"]["ancestors"][1]["licenses"] == [{"license": {"name": "llama3"}}]
    card = model["modelCard"]
    assert card["modelParameters"]["modelArchitecture"] == "LlamaForCausalLM"
    metric = {"type": "contains", "value": "0.9700", "slice": "image, 33"}
    assert card["quantitativeAnalysis"]["performanceMetrics"] == [metric]
    assert card["considerations"]["useCases"] == ["Support."]
    assert bill["components"][0]["hashes"] == [{"alg": "SHA-256", "content": DIGEST.hex}]
    # What it was made from does not state its licence.
    assert "licenses" not in ml_bom(facts(license=""))["metadata"]["component"]


def test_the_same_model_has_the_same_bill():
    assert ml_bom(facts()) == ml_bom(facts())
    assert ml_bom(facts())["serialNumber"] != ml_bom(facts(version="2"))["serialNumber"]


def test_an_engine_of_our_own():
    source = engine_source("llamacpp")
    bill = engine_bom("llamacpp", source, DIGEST)
    assert source["llama_cpp"]["commit"] in bill["metadata"]["component"]["purl"]
    assert {row["name"] for row in bill["components"]} == set(source["compiler"])


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("---\nlicense: mit\ntags: [a]\n---\n# X\n", "mit"),
        ("---\nlicense: [mit]\n---\n", ""),
        ("---\n: [\n---\n", ""),
        ("# no card", ""),
    ],
)
def test_a_licence_from_a_model_card(tmp_path, text, found):
    (tmp_path / "README.md").write_text(text)
    assert license_of(tmp_path) == found
    assert license_of(tmp_path / "none") == ""


def test_all_of_cyclonedx_is_kept():
    """Held against the schema where the library that has it is installed."""
    validation = pytest.importorskip("cyclonedx.validation.json")
    schema = pytest.importorskip("cyclonedx.schema")
    engine = engine_bom("llamacpp", engine_source("llamacpp"), DIGEST)
    assert [engine["specVersion"], ml_bom(facts())["specVersion"]] == ["1.6", "1.6"]
    for bill in (ml_bom(facts()), ml_bom(facts(), "1.7"), engine):
        version = schema.SchemaVersion.from_version(bill["specVersion"])
        assert validation.JsonStrictValidator(version).validate_str(json.dumps(bill)) is None
        assert all(urlsplit(url).netloc and url.isascii() for url in urls(bill))


def urls(value: Any) -> list[str]:
    """Return the addresses in a bill; the library checks their form only where it has a grammar."""
    if isinstance(value, list):
        return [url for inner in value for url in urls(inner)]
    if not isinstance(value, dict):
        return []
    own = [value["url"]] if isinstance(value.get("url"), str) else []
    return [*own, *(url for inner in value.values() for url in urls(inner))]


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
    rows = verify_image(name, public, base.client, Silent()).checks
    (documents,) = [row for row in rows if row.name.endswith("documents")]
    assert documents.ok
    assert {"base.spdx.json", CYCLONEDX} <= set(documents.found.split(", "))


def test_a_base_of_ours_has_a_bill_of_another_model(base, tmp_path):
    first, second = (f"{base.place.registry}/team/app:{number}" for number in "12")
    model = make_model(tmp_path / "model")
    bake(base.client, model, str(base.place), push=first)
    (model / "tiny.gguf").write_bytes(gguf_of(bytes(1000)))
    bake(base.client, model, first, push=second)
    rows = verify_image(second, None, base.client, Silent()).checks
    (documents,) = [row for row in rows if row.name.endswith("documents")]
    assert (documents.ok, documents.found) == (True, "model.cdx.json")
    assert not [row for row in rows if row.name.startswith("document model")]


@pytest.mark.parametrize("statement", [b"[]", b"no JSON", b'{"predicate":[]}', b"{}"])
def test_a_statement_that_says_nothing_is_no_bill(base, statement):
    base.attach(BILL)
    assert base.bills(base.state(statement)) == [(CYCLONEDX, BILL)]


def test_of_another_image_is_none_of_ours(base):
    statement = json.dumps({"predicate": {"spdxVersion": "SPDX-2.3"}}).encode()
    assert base.bills(base.state(statement, about=Digest.of(b"another"))) == []
