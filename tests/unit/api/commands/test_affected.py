"""`affected`: everything that was made from something, and whom to believe that it was."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from weightsmith.api.commands.affected import (
    affected_text,
    error_of,
    find_affected,
    question_of,
    withdraw_all,
)
from weightsmith.api.commands.requests import AffectedCommand
from weightsmith.api.results import Affected
from weightsmith.core.errors import InputRefused, UsageError
from weightsmith.core.ports import Silent
from weightsmith.core.values import Digest, canonical
from weightsmith.oci import manifests
from weightsmith.oci.attachments import Attachment, AttachmentPart, fallback_tag
from weightsmith.oci.image import Image, ImageConfig, Index, assemble
from weightsmith.oci.layers import Member, TarLayer
from weightsmith.oci.layout import LayoutLocation, write_layout
from weightsmith.oci.registry import ImageLocation, Registry, RegistryLocation
from weightsmith.outside.signer import open_signer
from weightsmith.provenance import evidence, signing, statements
from weightsmith.provenance.bills import MEDIA_TYPE, MODEL_BILL
from weightsmith.provenance.evidence import Evidence, read_attached, resource_of, titled
from weightsmith.provenance.origins import wanted
from weightsmith.provenance.recall import Recall
from weightsmith.provenance.sealing import attach, attach_signed
from weightsmith.provenance.statements import Resource, provenance, tree_resource

from tests.fakes import registry as fakes
from tests.fakes.baking import make_key
from tests.fakes.images import tree_of
from tests.fakes.registry import FakeRegistry, at, fake_registry

COMMIT = "c0ffee" + "1" * 34
PIN = f"hf://acme/support-lora@{COMMIT}"
BASE = "hf://acme/base-8b@" + "b" * 40
LABEL = "dev.weightsmith."


def checks(*keys: Path) -> dict[str, signing.Check]:
    return {str(key): signing.read_public_key(key) for key in keys}


class Shop:
    """A registry, and images as a build publishes them, without weights worth the name."""

    def __init__(self, fake: FakeRegistry, client: Registry, folder: Path) -> None:
        self.fake, self.client, self.folder = fake, client, folder
        self.key, self.public = make_key(folder)
        self.bill: Any = None

    def image(
        self, adapter: str, *, version: str = "v3", arch: str = "amd64", **labels: str
    ) -> Image:
        weights = Member.of_bytes("models/x.gguf", f"{adapter}{arch}".encode())
        named = {
            f"{LABEL}engine": "llamacpp",
            f"{LABEL}engine.version": "b8000",
            f"{LABEL}adapter.0.pin": adapter,
            f"{LABEL}adapter.0.digest": Digest.of(adapter.encode()),
            f"{LABEL}adapter.0.version": version,
            f"{LABEL}adapter.0.run_id": "wandb/abc123",
            f"{LABEL}base.pin": BASE,
            f"{LABEL}base.digest": Digest.of(BASE.encode()),
            f"{LABEL}artifact.digest": self.tree(adapter, arch).digest,
            f"{LABEL}verdict": "passed",
            **{f"{LABEL}{key}": text for key, text in labels.items()},
        }
        return assemble(
            (TarLayer(members=(weights,), epoch=0),),
            config=ImageConfig(labels=named),
            platform=f"linux/{arch}",
            epoch=0,
        )

    def tree(self, adapter: str, arch: str) -> Any:
        folder = self.folder / Digest.of(f"{adapter}{arch}".encode()).short
        folder.mkdir(exist_ok=True)
        return tree_of(folder, {"x.gguf": f"{adapter}{arch}".encode()})

    def state(self, image: Image, adapter: str, place: ImageLocation, key: Path | None) -> None:
        """Attach the statements of a build."""
        tree = self.tree(adapter, image.platform.partition("/")[2])
        sources = [
            tree_resource("base", Digest.of(BASE.encode()), BASE),
            tree_resource("adapter:0", Digest.of(adapter.encode()), adapter),
        ]
        builder = [Resource(name="builder:merge", digest=Digest.of(b"pins"))]
        files = statements.file_resources(tree)
        merged = provenance("merge", files, parameters={}, dependencies=sources, builder=builder)
        documents = [titled(MEDIA_TYPE, MODEL_BILL, self.bill)] if self.bill else []
        about = statements.image_resource(image.manifest_blob)
        baked = provenance(
            "bake",
            [about, *statements.layer_resources(image)],
            parameters={"target": "llamacpp"},
            dependencies=[tree_resource("artifact", tree.digest)],
            byproducts=[*map(resource_of, documents)],
        )
        evidence = Evidence(statements=(merged, baked), documents=tuple(documents))
        signer = open_signer(str(key)) if key else None
        attach(evidence, image.manifest_blob, "team/app", place, signer)

    def push(
        self, name: str, adapter: str = PIN, key: Path | None = None, *, signed: bool = True,
        **more: str,
    ) -> Image:  # fmt: skip
        image = self.image(adapter, **more)
        place = RegistryLocation(self.client, at(self.fake, name))
        self.client.push(image, place.reference)
        self.state(image, adapter, place, (key or self.key) if signed else None)
        return image

    def ask(self, place: str = "", *keys: Path, **asked: str) -> Affected:
        where = f"{self.fake.host}{'/' if place else ''}{place}"
        command = AffectedCommand(in_=(where,), **asked)
        question = question_of(command, lambda folder: Digest.of(str(folder).encode()))
        chosen = checks(*keys or (self.public,))
        return find_affected(question, [where], chosen, self.client, Silent())

    def names(self, *more: Any, **asked: str) -> tuple[list[str], list[str]]:
        """Return the references found, of signed images and of others."""
        found = self.ask(*more, **asked)
        rows = [[row.reference.partition("/")[2] for row in part]
                for part in (found.images, found.unsigned)]  # fmt: skip
        return rows[0], rows[1]


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    with fake_registry() as fake, Registry(pause=lambda _: None) as client:
        yield Shop(fake, client, tmp_path)


def test_every_image_of_an_adapter_is_found_and_no_other(shop: Shop) -> None:
    made = shop.push("team/app:1")
    shop.push("team/deep/er:1", version="v4")
    shop.push("team/other:1", "hf://acme/sales-lora@" + "d" * 40)
    shop.push("teammate/app:1")

    found = shop.ask("team", adapter=PIN)

    assert [row.reference for row in found.images] == [
        f"{shop.fake.host}/team/app:1", f"{shop.fake.host}/team/deep/er:1"
    ]  # fmt: skip
    row = found.images[0]
    assert (row.digest, row.form, row.verdict) == (made.digest, "image", "passed")
    assert (row.platforms, row.chain) == (("linux/amd64",), "whole")
    assert row.signed_by == (str(shop.public),)
    assert (row.built, row.dated) == (None, "")
    assert row.withdrawn is None
    assert (found.unsigned, found.problems, found.others) == ((), (), ())
    assert "team/app:1" in affected_text(found)


def test_an_image_without_a_time_is_dated_by_others(shop: Shop) -> None:
    """By what is signed about it, and the earliest of that; by a note only without any."""
    image = shop.push("team/app:1").manifest_blob
    place = RegistryLocation(shop.client, at(shop.fake, "team/app:1"))

    def dated() -> tuple[str | None, str]:
        (row,) = shop.ask("team", adapter=PIN).images
        return row.built, row.dated

    for when in ("garbage", "2026-03-01T00:00:00", "2026-03-01T02:00:00+02:00"):
        part = AttachmentPart.of_bytes(when.encode(), "text/plain")
        notes = {"org.opencontainers.image.created": when}
        kind = evidence.STATEMENTS[0]
        place.attach(
            Attachment(artifact_type=kind, subject=image, parts=(part,), annotations=notes)
        )
    assert dated() == ("2026-03-01T00:00:00Z", "annotation")
    others, _ = make_key(shop.folder, "nobody")
    times = (("2026-02-03T00:00:00Z", shop.key), ("2026-02-02T00:00:00Z", shop.key),
             ("2026-01-01T00:00:00Z", others))  # fmt: skip
    for when, key in times:
        said = statements.statement(
            [statements.image_resource(image)], statements.VSA, {"timeVerified": when}
        )
        attach_signed([said], image, place, open_signer(str(key)))
    assert dated() == ("2026-02-02T00:00:00Z", "statement")


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("adapter", PIN),
        ("adapter", "hf://acme/support-lora"),
        ("adapter", "https://huggingface.co/acme/support-lora"),
        ("adapter", "acme/support-lora"),
        ("adapter", "support-lora"),
        ("adapter", "Support-LoRA"),
        ("adapter", COMMIT),
        ("adapter", COMMIT[:9]),
        ("adapter", f"hf://acme/support-lora@{COMMIT[:8]}"),
        ("adapter", "v3"),
        ("adapter", "support-lora@v3"),
        ("adapter", str(Digest.of(PIN.encode()))),
        ("adapter", Digest.of(PIN.encode()).hex[:12]),
        ("base", "hf://acme/base-8b"),
        ("base", "base-8b"),
        ("base", str(Digest.of(BASE.encode()))),
        ("engine", "llamacpp"),
        ("engine", "llamacpp@b8000"),
        ("engine", "llamacpp<b11500"),
        ("engine", "b8000"),
        ("builder", "merge"),
        ("builder", "builder:merge"),
        ("builder", str(Digest.of(b"pins"))),
        ("builder", "weightsmith<99"),
        ("dataset_run", "wandb/abc123"),
        ("dataset_run", "abc123"),
    ],
)
def test_a_value_is_what_people_type(shop: Shop, kind: str, value: str) -> None:
    shop.push("team/app:1")
    assert shop.names(**{kind: value}) == (["team/app:1"], [])


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("adapter", "lora"),
        ("adapter", "hf://acme/support"),
        ("adapter", "v33"),
        ("adapter", "support-lora@v4"),
        ("adapter", "d" * 12),
        ("base", "hf://acme/support-lora"),
        ("engine", "vllm"),
        ("engine", "llamacpp@b8001"),
        ("engine", "llamacpp<b8000"),
        ("builder", "awq"),
        ("builder", "weightsmith<0.0.1"),
        ("dataset_run", "abc"),
    ],
)
def test_what_only_resembles_it_is_not_it(shop: Shop, kind: str, value: str) -> None:
    shop.push("team/app:1")
    assert shop.names(**{kind: value}) == ([], [])


def test_a_folder_is_known_by_its_content(shop: Shop, tmp_path: Path) -> None:
    shop.push("team/app:1")
    asked = AffectedCommand(in_=("x",), adapter=str(tmp_path))
    question = question_of(asked, lambda _: Digest.of(PIN.encode()))
    found = find_affected(question, [shop.fake.host], checks(shop.public), shop.client, Silent())
    assert len(found.images) == 1


BILL = {
    "metadata": {
        "component": {
            "type": "machine-learning-model",
            "name": "support",
            "licenses": [{"license": {"id": "Apache-2.0"}}],
            "pedigree": {
                "ancestors": [{"name": "base", "licenses": [{"license": {"name": "llama3"}}]}]
            },
        }
    },
    "components": [
        {"type": "library", "name": "openssl", "version": "3.0.11-1~deb12u2",
         "purl": "pkg:deb/debian/openssl@3.0.11-1~deb12u2?arch=amd64"},
        {"type": "library", "name": "torch", "version": "2.4.0+cpu",
         "licenses": [{"expression": "BSD-3-Clause OR MIT"}]},
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "value", "hit"),
    [
        ("license", "apache-2.0", True),
        ("license", "llama3", True),
        ("license", "MIT", True),
        ("license", "GPL-3.0-only", False),
        ("cve_package", "openssl", True),
        ("cve_package", "openssl>=3.0,<3.0.12", True),
        ("cve_package", "openssl < 3.0.11-1~deb12u2", False),
        ("cve_package", "openssl@3.0.11-1~deb12u2", True),
        ("cve_package", "pkg:deb/debian/openssl", True),
        ("cve_package", "pkg:deb/debian/openssl@3.0.11-1~deb12u2", True),
        ("cve_package", "torch==2.4", True),
        ("cve_package", "torch<2.4.0rc1", False),
        ("cve_package", "ssl", False),
    ],
)
def test_licences_and_packages_are_in_the_bills(
    shop: Shop, kind: str, value: str, hit: bool
) -> None:
    shop.bill = BILL
    shop.push("team/app:1")
    assert shop.names(**{kind: value}) == (["team/app:1"] if hit else [], [])


def test_an_image_without_a_bill_is_a_gap_in_the_answer(shop: Shop) -> None:
    shop.push("team/app:1")
    found = shop.ask(cve_package="openssl")
    assert "bill of materials" in found.problems[0].why
    assert error_of(found) is None


def test_what_nobody_signed_is_listed_apart(shop: Shop) -> None:
    shop.push("team/app:1", signed=False)
    _, other = shop.folder, make_key(shop.folder, "other")
    shop.push("team/theirs:1", key=other[0], version="v9")

    found = shop.ask(adapter=PIN)

    assert found.images == ()
    assert [row.chain for row in found.unsigned] == [
        "unsigned",
        "not signed by a key that was given",
    ]
    assert [row.signed_by for row in found.unsigned] == [(), ()]
    both = shop.ask("", shop.public, other[1], adapter=PIN)
    assert [row.signed_by for row in both.images] == [(str(other[1]),)]


def test_without_a_key_no_signature_is_checked(shop: Shop) -> None:
    shop.push("team/app:1")
    where = shop.fake.host
    question = question_of(AffectedCommand(in_=(where,), adapter=PIN), lambda _: Digest.of(b""))
    found = find_affected(question, [where], {}, shop.client, Silent())
    assert [(row.signed_by, "not checked" in row.chain) for row in found.images] == [((), True)]


def test_a_label_that_no_signature_covers_is_not_believed(shop: Shop) -> None:
    """Somebody pushes an image with our labels, and hangs our statements of another on it."""
    ours = shop.push("team/app:1")
    place = RegistryLocation(shop.client, at(shop.fake, "team/app:1"))
    theirs = shop.image(PIN, version="v8")
    shop.client.push(theirs, at(shop.fake, "team/fake:1"))
    there = RegistryLocation(shop.client, at(shop.fake, "team/fake:1"))
    for blob, tag in place.attached(ours.digest):
        there.attach(replace(place.read(blob, tag).about(theirs.manifest_blob), tag=""))

    signed, unsigned = shop.names(adapter=PIN)

    assert (signed, unsigned) == (["team/app:1"], ["team/fake:1"])


def test_a_statement_that_is_missing_breaks_the_chain(shop: Shop) -> None:
    image = shop.image(PIN)
    place = RegistryLocation(shop.client, at(shop.fake, "team/app:1"))
    shop.client.push(image, place.reference)
    about = statements.image_resource(image.manifest_blob)
    tree = shop.tree(PIN, "amd64")
    baked = provenance(
        "bake",
        [about, *statements.layer_resources(image)],
        parameters={},
        dependencies=[tree_resource("artifact", tree.digest)],
    )
    signer = open_signer(str(shop.key))
    attach(Evidence(statements=(baked,)), image.manifest_blob, "x", place, signer)

    (row,) = shop.ask(adapter=PIN).images

    assert row.chain == "broken at merge: no statement says how base and adapters were merged"


def push_index(shop: Shop, name: str, *images: Image, key: Path | None = None) -> Index:
    index = Index(images=images)
    place = RegistryLocation(shop.client, at(shop.fake, name))
    shop.client.push(index, place.reference)
    for image in images:
        shop.state(image, PIN, place, shop.key)
    if key:
        attach(Evidence(), index.manifest_blob, "x", place, open_signer(str(key)))
    return index


def test_an_index_is_listed_with_its_images(shop: Shop) -> None:
    images = [shop.image(PIN, arch=arch) for arch in ("amd64", "arm64")]
    index = push_index(shop, "team/app:1", *images, key=shop.key)

    found = shop.ask(adapter=PIN)

    rows = {row.digest: row for row in found.images}
    assert set(rows) == {index.digest, *(image.digest for image in images)}
    top = rows[index.digest]
    assert (top.form, top.platforms) == ("index", ("linux/amd64", "linux/arm64"))
    assert (top.reference, top.chain) == (f"{shop.fake.host}/team/app:1", "whole")
    assert found.problems == ()


def test_an_index_that_is_not_signed_is_not_trusted(shop: Shop) -> None:
    index = push_index(shop, "team/app:1", shop.image(PIN), shop.image(PIN, arch="arm64"))
    found = shop.ask(adapter=PIN)
    assert [row.digest for row in found.unsigned] == [index.digest]
    assert len(found.images) == 2


def put(shop: Shop, name: str, rows: list[Any]) -> str:
    """Store an index under a tag; return its digest."""
    body = manifests.index_of(rows)
    repository, _, tag = name.partition(":")
    for key in (tag, str(Digest.of(body))):
        shop.fake.manifests[repository, key] = manifests.OCI_INDEX, body
    return str(Digest.of(body))


def row(image: Image, platform: str, **more: Any) -> dict[str, Any]:
    system, _, machine = platform.partition("/")
    where = {"platform": {"os": system, "architecture": machine}}
    return {**manifests.described(image.manifest_blob), **where, **more}


def test_an_index_that_lies_is_named(shop: Shop) -> None:
    image = shop.push("team/app:1")
    for name in (str(image.digest), "0"):
        shop.fake.manifests["team/lies", name] = shop.fake.manifests["team/app", image.digest]
    for (name, digest), data in list(shop.fake.blobs.items()):
        shop.fake.blobs[name.replace("app", "lies"), digest] = data
    del shop.fake.manifests["team/lies", "0"]
    put(shop, "team/lies:1", [row(image, "linux/arm64", size=7)])
    gone = {**row(image, "linux/amd64"), "digest": str(Digest.of(b"gone"))}
    put(shop, "team/gone:1", [gone])
    put(shop, "team/odd:1", [7, "x", None])

    found = shop.ask(adapter=PIN)

    said = {one.reference.partition("/")[2].partition("@")[0]: one.why for one in found.problems}
    assert "404" in said["team/gone"]
    assert "media type" in said["team/odd:1"]
    lies = " ".join(one.why for one in found.problems if "team/lies" in one.reference)
    assert "says that it is for linux/arm64" in lies
    assert "says that it has 7 bytes" in lies


def test_indexes_in_a_loop_end(shop: Shop) -> None:
    """A registry that answers a digest with another index is caught; so is one too deep."""
    image = shop.push("team/app:1")
    below: Any = row(image, "linux/amd64")
    for depth in range(12):
        digest = put(shop, f"team/app:deep{depth}", [below])
        size = len(shop.fake.manifests["team/app", digest][1])
        below = {"mediaType": manifests.OCI_INDEX, "digest": digest, "size": size}
    for depth in range(11):
        del shop.fake.manifests["team/app", f"deep{depth}"]
    loop = put(shop, "team/loop:1", [{**below, "digest": str(Digest.of(b"loop"))}])
    shop.fake.manifests["team/loop", str(Digest.of(b"loop"))] = shop.fake.manifests[
        "team/loop", loop
    ]

    found = shop.ask(adapter=PIN)

    said = " ".join(one.why for one in found.problems)
    assert "nested deeper than 8" in said
    assert "wrong digest" in said
    assert "team/app:1" in [r.reference.partition("/")[2] for r in found.images]
    assert exit_code(found) == 5


def exit_code(found: Affected) -> int:
    failure = error_of(found)
    return failure.exit_code if failure else 0


def test_an_index_that_is_too_large_to_be_read_is_a_gap_and_ends_with_5(shop: Shop) -> None:
    image = shop.push("team/app:1")
    put(shop, "team/app:many", [row(image, "linux/amd64")] * 1001)

    found = shop.ask(adapter=PIN)

    (problem,) = found.problems
    assert problem.reference.endswith("team/app:many")
    assert "lists 1001 images" in problem.why
    assert exit_code(found) == 5


def test_a_row_that_is_no_image_hides_no_other(shop: Shop) -> None:
    image = shop.push("team/app:1")
    chart = {"mediaType": "application/vnd.cncf.helm.chart", "digest": image.digest, "size": 1}
    put(shop, "team/app:all", [chart, row(image, "linux/amd64")])

    found = shop.ask(adapter=PIN)

    assert [r.reference.rpartition("/")[2] for r in (*found.images, *found.unsigned)] == [
        "app:1", "app:all"
    ]  # fmt: skip
    assert "helm.chart" in found.problems[0].why
    assert exit_code(found) == 0


@pytest.mark.parametrize("outer", ["a", "z"])
def test_an_index_that_lists_an_index_with_a_tag_is_found(shop: Shop, outer: str) -> None:
    """Whichever of the two is read first."""
    image = shop.push("team/app:1")
    inner = put(shop, "team/app:m", [row(image, "linux/amd64")])
    size = len(shop.fake.manifests["team/app", inner][1])
    whole = put(
        shop,
        f"team/app:{outer}",
        [{"mediaType": manifests.OCI_INDEX, "digest": inner, "size": size}],
    )
    found = shop.ask(adapter=PIN)
    assert {one.digest for one in found.unsigned} == {inner, whole}
    assert found.problems == ()


def test_an_index_that_lies_about_an_image_with_a_tag_is_named(shop: Shop) -> None:
    image = shop.push("team/app:1")
    put(shop, "team/app:all", [row(image, "linux/arm64", size=7)])
    said = " ".join(one.why for one in shop.ask(adapter=PIN).problems)
    assert "says that it is for linux/arm64" in said
    assert "says that it has 7 bytes" in said


@pytest.mark.parametrize("rows", [[{"size": -1}], [{"size": 1}] * 1001, "no list"])
def test_a_bad_list_of_attachments_hides_no_image(shop: Shop, rows: Any) -> None:
    """Whoever may push can write that list where a registry has no referrers API."""
    image = shop.push("team/app:1")
    if isinstance(rows, list):
        digests = [str(Digest.of(b"%d" % number)) for number in range(len(rows))]
        kind = {"mediaType": manifests.OCI_MANIFEST}
        rows = [{**kind, "digest": d, **more} for d, more in zip(digests, rows, strict=True)]
    body = canonical({"schemaVersion": 2, "mediaType": manifests.OCI_INDEX, "manifests": rows})
    shop.fake.manifests["team/app", fallback_tag(image.digest)] = manifests.OCI_INDEX, body

    found = shop.ask(adapter=PIN)

    assert image.digest in {one.digest for one in (*found.images, *found.unsigned)}
    assert exit_code(found) == 5


def test_a_statement_that_hangs_elsewhere_as_another_kind_still_counts(shop: Shop) -> None:
    """Its bytes are read once, and were read first where somebody says that they are unsigned."""
    ours = shop.push("team/app:1")
    theirs = shop.image(PIN, version="v8")
    place = RegistryLocation(shop.client, at(shop.fake, "team/app:1"))
    attached = read_attached(place, ours.digest)
    kind = signing.STATEMENT_TYPE
    parts = [replace(p, blob=replace(p.blob, media_type=kind)) for a in attached for p in a.parts]
    plain = Attachment(artifact_type=kind, subject=theirs.manifest_blob, parts=tuple(parts))
    recall = Recall(wanted=wanted("adapter", PIN), keys=checks(shop.public))

    assert not recall.judge(theirs, [plain], list, "a", ()).trusted
    found = recall.judge(ours, attached, list, "b", ()).row
    assert found
    assert found.chain == "whole"


def test_a_registry_with_the_referrers_api(shop: Shop) -> None:
    image = shop.push("team/app:1")
    tag = fallback_tag(image.digest)
    _, listed = shop.fake.manifests.pop(("team/app", tag))
    shop.fake.referrers = {("team/app", str(image.digest)): listed}
    assert shop.names(adapter=PIN) == (["team/app:1"], [])


def test_an_image_without_a_tag_is_found_by_what_is_attached_to_it(shop: Shop) -> None:
    image = shop.push("team/app:1")
    shop.push("team/app:2", "hf://acme/sales-lora@" + "d" * 40)
    del shop.fake.manifests["team/app", "1"]
    assert shop.names(adapter=PIN) == ([f"team/app@{image.digest}"], [])


def test_a_referrer_of_another_image_is_left_out(shop: Shop) -> None:
    ours, other = shop.push("team/app:1"), shop.push("team/app:2", "hf://acme/sales-lora")
    tags = [fallback_tag(image.digest) for image in (ours, other)]
    shop.fake.manifests["team/app", tags[1]] = shop.fake.manifests["team/app", tags[0]]

    found = shop.ask(adapter=PIN)

    assert [r.digest for r in found.images] == [ours.digest]
    assert any("about another image" in one.why for one in found.problems)


def test_images_of_others_are_counted_and_nothing_more(shop: Shop) -> None:
    shop.push("team/app:1")
    layer = TarLayer(members=(Member.of_bytes("bin/sh", b"x"),), epoch=0)
    image = assemble((), (layer,), config=ImageConfig(labels={"a": "b"}), epoch=0)
    shop.client.push(image, at(shop.fake, "theirs/app:1"))
    config = {"mediaType": "application/vnd.cncf.helm.config.v1+json"}
    chart = canonical({"schemaVersion": 2, "config": config})
    shop.fake.manifests["theirs/chart", "1"] = manifests.OCI_MANIFEST, chart

    found = shop.ask(adapter=PIN)

    assert [name.partition("/")[2] for name in found.others] == ["theirs/app:1", "theirs/chart:1"]
    assert found.problems == ()


@pytest.mark.parametrize(
    "manifest",
    [b"", b"[]", b"7", b'{"config": []}', b'{"config": {"mediaType": []}}', b"\xff", b"{" * 300,
     b'{"config": {"mediaType": "application/vnd.oci.image.config.v1+json", "size": 1}}'],
)  # fmt: skip
def test_a_manifest_that_is_none_stops_nothing(shop: Shop, manifest: bytes) -> None:
    shop.push("team/app:1")
    shop.fake.manifests["team/bad", "1"] = manifests.OCI_MANIFEST, manifest
    assert shop.names(adapter=PIN)[0] == ["team/app:1"]


@pytest.mark.parametrize("status", ["401", "403", "500"])
def test_a_repository_that_is_refused_is_a_gap_and_ends_with_5(shop: Shop, status: str) -> None:
    shop.push("team/app:1")
    shop.push("team/secret:1")
    shop.fake.faults += [("GET", "team/secret/tags", status)] * 6

    found = shop.ask(adapter=PIN)

    assert [r.reference.partition("/")[2] for r in found.images] == ["team/app:1"]
    (problem,) = found.problems
    assert problem.unreachable
    assert problem.reference.endswith("team/secret")
    failure = error_of(found)
    assert failure is not None
    assert failure.exit_code == 5
    assert failure.details["images"]


def test_a_registry_that_asks_for_patience_gets_it(shop: Shop) -> None:
    shop.push("team/app:1")
    shop.fake.faults += [("GET", "manifests", "429")] * 3
    assert shop.names(adapter=PIN) == (["team/app:1"], [])


def test_credentials_are_used_for_the_catalog_too(shop: Shop) -> None:
    shop.push("team/app:1")
    shop.fake.auth = "bearer"
    pair = (shop.fake.user, shop.fake.password)
    with Registry(credentials=lambda _: pair, pause=lambda _: None) as shop.client:
        assert shop.names("team", adapter=PIN) == (["team/app:1"], [])
    scopes = [path for _, path in shop.fake.log if path.startswith("/token")]
    assert any("scope=registry%3Acatalog%3A%2A" in path for path in scopes)


def test_a_registry_without_a_catalog_needs_names(shop: Shop) -> None:
    shop.push("team/app:1")
    shop.fake.has_catalog = False
    assert shop.names("team/app", adapter=PIN) == (["team/app:1"], [])
    found = shop.ask(adapter=PIN)
    assert "does not list its repositories" in found.problems[0].why
    assert error_of(found) is not None
    with pytest.raises(InputRefused, match="no such repository"):
        shop.ask("team", adapter=PIN)


def test_long_lists_come_in_pages(shop: Shop) -> None:
    image = shop.push("team/app:1")
    for number in range(40):
        shop.fake.manifests["team/app", f"t{number}"] = shop.fake.manifests["team/app", "1"]
        shop.fake.manifests[f"team/r{number}", "1"] = manifests.OCI_MANIFEST, b"{}"
    shop.fake.page = 7

    found = shop.ask(adapter=PIN)

    (row,) = found.images
    assert (row.digest, len(row.tags)) == (image.digest, 41)
    assert found.repositories == 41


def test_a_list_without_an_end_is_refused(shop: Shop) -> None:
    shop.push("team/app:1")
    shop.push("team/b:1")
    answers = json.dumps({"repositories": ["team/app"]}).encode()

    def loop(self: Any, path: str, query: Any, key: str, rows: Any) -> None:
        self.answer(200, answers, Link=f'<{path}?n=1000>; rel="next"')

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fakes._Handler, "names", loop)
        found = shop.ask(adapter=PIN)
    assert "does not end" in found.problems[0].why


def test_a_name_that_is_none_is_never_asked_for(shop: Shop) -> None:
    shop.push("team/app:1")
    shop.fake.manifests["team/app", "../../../token"] = manifests.OCI_MANIFEST, b"{}"
    shop.fake.manifests["../secret", "1"] = manifests.OCI_MANIFEST, b"{}"
    assert shop.names(adapter=PIN) == (["team/app:1"], [])
    assert not any("token" in path or "secret" in path for _, path in shop.fake.log)


def test_one_image_may_be_named(shop: Shop) -> None:
    image = shop.push("team/app:1")
    shop.push("team/app:2", version="v4")
    assert shop.names("team/app:1", adapter=PIN) == (["team/app:1"], [])
    assert len(shop.ask(f"team/app@{image.digest}", adapter=PIN).images) == 1


@pytest.mark.parametrize("name", ["team/app:2", f"team/app@{Digest.of(b'gone')}"])
def test_a_named_image_that_is_not_there_ends_with_5(shop: Shop, name: str) -> None:
    """A mistyped tag must not read as *nothing is affected*."""
    shop.push("team/app:1")
    found = shop.ask(name, adapter=PIN)
    assert "404" in found.problems[0].why
    assert exit_code(found) == 5


def test_a_layout_and_a_fleets_results_are_places(shop: Shop, tmp_path: Path) -> None:
    image = shop.push("team/app:1")
    write_layout(image, tmp_path / "layout")
    here = LayoutLocation(tmp_path / "layout")
    shop.state(image, PIN, here, shop.key)
    cells = [
        {"adapter": "a", "target": "t", "digest": image.digest, "image": name}
        for name in (f"oci:{tmp_path / 'layout'}", f"{shop.fake.host}/team/app:1")
    ]
    dist = tmp_path / "dist"
    dist.mkdir()
    (dist / "fleet.json").write_text(json.dumps({"cells": cells, "shared": []}))
    question = question_of(AffectedCommand(in_=("x",), adapter=PIN), lambda _: Digest.of(b""))

    found = find_affected(question, [str(dist)], checks(shop.public), shop.client, Silent())

    assert [row.reference for row in found.images] == [
        f"{shop.fake.host}/team/app:1", f"oci:{tmp_path / 'layout'}:latest"
    ]  # fmt: skip


@pytest.mark.parametrize("gone", ["oci:{}/gone", "{}/gone"])
def test_an_image_of_a_fleet_that_is_gone_stops_no_other(
    shop: Shop, tmp_path: Path, gone: str
) -> None:
    image = shop.push("team/app:1")
    cells = [
        {"adapter": "a", "target": "t", "digest": image.digest, "image": name}
        for name in (gone.format(tmp_path), f"{shop.fake.host}/team/app:1")
    ]
    (tmp_path / "fleet.json").write_text(json.dumps({"cells": cells, "shared": []}))
    question = question_of(AffectedCommand(in_=("x",), adapter=PIN), lambda _: Digest.of(b""))

    found = find_affected(question, [str(tmp_path)], checks(shop.public), shop.client, Silent())

    assert [row.digest for row in found.images] == [image.digest]
    assert found.problems[0].reference.startswith(cells[0]["image"])
    assert exit_code(found) == 5


def test_an_index_in_a_layout_is_listed_with_its_images(shop: Shop, tmp_path: Path) -> None:
    images = [shop.image(PIN, arch=arch) for arch in ("amd64", "arm64")]
    index = Index(images=tuple(images))
    write_layout(index, tmp_path / "layout", ref="1")
    here = LayoutLocation(tmp_path / "layout", "1")
    for image in images:
        shop.state(image, PIN, here, shop.key)
    attach(Evidence(), index.manifest_blob, "x", here, open_signer(str(shop.key)))
    question = question_of(AffectedCommand(in_=("x",), adapter=PIN), lambda _: Digest.of(b""))

    def ask() -> Affected:
        where = [f"oci:{tmp_path / 'layout'}"]
        return find_affected(question, where, checks(shop.public), shop.client, Silent())

    found = ask()
    assert {one.digest for one in found.images} == {index.digest, *(i.digest for i in images)}
    assert found.problems == ()
    withdraw_all(found, "wrong", open_signer(str(shop.key)), shop.client, Silent())
    assert {(one.form, (one.withdrawn or "")[:5]) for one in ask().images} == {
        ("index", "wrong"), ("image", "wrong")
    }  # fmt: skip


@pytest.mark.parametrize(
    "document", ["[]", "null", "7", '{"cells": 7}', '{"cells": [7], "shared": []}', "{"]
)
def test_a_damaged_list_of_a_fleet_is_refused(shop: Shop, tmp_path: Path, document: str) -> None:
    (tmp_path / "fleet.json").write_text(document)
    question = question_of(AffectedCommand(in_=("x",), adapter=PIN), lambda _: Digest.of(b""))
    with pytest.raises(InputRefused, match=r"fleet\.json is damaged") as error:
        find_affected(question, [str(tmp_path)], {}, shop.client, Silent())
    assert error.value.hint == "run the fleet again"


@pytest.mark.parametrize("place", ["", " ", "oci:"])
def test_an_empty_place_is_none(shop: Shop, place: str) -> None:
    with pytest.raises(UsageError, match="--in names no place"):
        find_affected(wanted("adapter", "x"), [place], {}, shop.client, Silent())


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"adapter": "x", "base": "y"},
        {"adapter": " "},
        {"cve_package": "openssl>"},
        {"cve_package": ">=3"},
        {"cve_package": "pkg:"},
        {"cve_package": "pkg:deb"},
        {"cve_package": "openssl>=3,<1"},
        {"engine": "vllm>0.32,<0.32"},
        {"engine": "vllm==0.32,==0.33"},
    ],
)
def test_exactly_one_thing_is_asked_for(asked: dict[str, str]) -> None:
    with pytest.raises(UsageError):
        question_of(AffectedCommand(in_=("x",), **asked), lambda _: Digest.of(b""))


@pytest.mark.parametrize("text", ["vllm>=0.32,<0.33.1", "vllm>=1,<=1", "vllm==1", "vllm"])
def test_the_answer_says_all_that_was_asked(shop: Shop, text: str) -> None:
    """A withdrawal has it as its reason."""
    shop.push("team/app:1")
    found = find_affected(wanted("engine", text), [shop.fake.host], {}, shop.client, Silent())
    assert (found.value, affected_text(found).splitlines()[0]) == (
        text,
        f"0 made from engine {text}",
    )


def test_few_bytes_are_read(shop: Shop) -> None:
    """No layer of an image, and no document that was not asked for."""
    shop.bill = BILL
    image = shop.push("team/app:1")
    before = len(shop.fake.log)
    shop.ask(adapter=PIN)
    paths = [path for _, path in shop.fake.log[before:]]
    assert not any(layer.digest in path for layer in image.layers for path in paths)
    assert len(paths) < 20
