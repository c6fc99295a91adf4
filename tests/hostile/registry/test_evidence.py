"""Whoever may write to the repository has no key: copies statements, and wants them signed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from weightsmith.api.commands.images import copy_image
from weightsmith.api.commands.rebase import rebase_image
from weightsmith.api.commands.recipes import recipe_of_image
from weightsmith.api.commands.requests import RebaseCommand
from weightsmith.api.commands.verify import verify_image
from weightsmith.core.errors import CheckFailed, InputRefused
from weightsmith.core.ports import Silent
from weightsmith.core.values import Blob, Digest
from weightsmith.oci.attachments import Attachment, AttachmentPart
from weightsmith.oci.image import Index
from weightsmith.oci.layers import TITLE
from weightsmith.oci.references import Reference
from weightsmith.oci.registry import Registry, RegistryLocation
from weightsmith.outside.signer import open_signer
from weightsmith.provenance import signing, statements
from weightsmith.provenance.attest import test_result as result_of
from weightsmith.provenance.bills import MEDIA_TYPE
from weightsmith.provenance.evidence import (
    ADAPTER_TYPE,
    EVALUATION_TYPE,
    NUMBER,
    Evidence,
    own_statements,
    read_attached,
    read_statement,
    resource_of,
)
from weightsmith.provenance.sealing import attach
from weightsmith.provenance.statements import Statement

from tests.fakes.baking import bake, gguf_of, make_key, make_model, push_base
from tests.fakes.journal import RecordingProgress
from tests.fakes.memory import memory_tools
from tests.fakes.registry import FakeRegistry


@dataclass
class Shop:
    """Two images that one key made; each differs from the other in its weights."""

    fake: FakeRegistry
    client: Registry
    key: Path
    public: Path
    base: str
    folder: Path

    def bake(self, name: str, key: Path | None = None) -> str:
        model = make_model(self.folder / name)
        (model / "tiny.gguf").write_bytes(gguf_of(name.encode() * 1000))
        reference = f"{self.fake.host}/team/{name}:1"
        bake(self.client, model, self.base, key or self.key, push=reference)
        return reference

    def place(self, name: str) -> RegistryLocation:
        return RegistryLocation(self.client, Reference.parse(name))

    def blob(self, name: str) -> Blob:
        return self.place(name).image("linux/amd64").manifest_blob

    def state(self, name: str, *told: Statement, key: Path | None = None) -> None:
        """Hang statements on an image, signed."""
        signer = open_signer(str(key or self.key))
        attach(Evidence(statements=told), self.blob(name), "team", self.place(name), signer)

    def rebase(self, name: str, key: Path | None = None) -> str:
        """Move an image to the other base; return its new name."""
        onto, to = self.base[:-1] + "2", f"{self.fake.host}/team/app:2"
        request = RebaseCommand(source=name, onto=onto, to=to, smoke=False)
        tools = memory_tools(self.folder, registry=self.client, key=key or self.key)
        rebase_image(request, tools)
        return to

    def hang(self, name: str, kind: str, *parts: AttachmentPart, **notes: str) -> None:
        """Hang something on an image that nobody signed."""
        made = Attachment(
            artifact_type=kind, subject=self.blob(name), parts=parts, annotations=notes
        )
        self.place(name).attach(made)

    def plant(self, name: str, *told: Statement, key: Path | None = None) -> None:
        """Hang statements on an image as somebody may who has no key but found them signed."""
        signer = open_signer(str(key or self.key))
        for one in told:
            envelope = signing.sign_statement(one, signer)
            part = signing.envelope_part(envelope, one.predicate_type)
            self.hang(name, part.blob.media_type, part)

    def stated(self, name: str, public: Path | None = None) -> list[Statement]:
        """Return what hangs on an image as statements, each with whether the key signed it."""
        parts = own_statements(read_attached(self.place(name), self.blob(name).digest))
        check = signing.read_public_key(public or self.public)
        return [read_statement(part, check) for part in parts]

    def rows(self, name: str, *, key: bool = True) -> dict[str, tuple[bool | None, str]]:
        """Return each check of `verify`; of several with one name, the worst."""
        try:
            checks = verify_image(name, self.public if key else None, self.client, Silent()).checks
            rows = [(one.name, one.ok, one.found) for one in checks]
        except CheckFailed as error:
            rows = [(row["check"], row["ok"], row["found"]) for row in error.details["checks"]]
        order = sorted(rows, key=lambda row: row[1] is False)
        return {name: (ok, said) for name, ok, said in order}


def passed(image: Blob, *more: statements.Resource, result: str = "PASSED") -> Statement:
    told = result_of((), ())
    about = [statements.image_resource(image), *more]
    return statements.statement(about, statements.TEST_RESULT, {**told, "result": result})


@pytest.fixture
def shop(fake, client, tmp_path, monkeypatch) -> Shop:
    monkeypatch.setenv("WEIGHTSMITH_STORE", str(tmp_path / "store"))
    base = f"{fake.host}/base/engine:1"
    engine = {"dev.weightsmith.engine": "llamacpp", "org.opencontainers.image.version": "1.0.0"}
    for tag in ("1", "2"):
        push_base(client, base[:-1] + tag, engine, {"app/llama-server": tag.encode()})
    return Shop(fake, client, *make_key(tmp_path), base, tmp_path)


def test_scores_of_another_image_are_no_evidence(shop):
    good, bad = shop.bake("good"), shop.bake("bad")
    told = passed(shop.blob(good))
    shop.state(good, told)
    assert shop.rows(good)["gate"][0]
    shop.plant(bad, told)
    for key in (True, False):
        rows = shop.rows(bad, key=key)
        assert rows.get("gate", (False, ""))[0] is not True
        ok, found = rows["statement test-result/v0.1"]
        assert ok is False
        assert f"about another image ({shop.blob(good).digest.short})" in found


def test_scores_of_two_images_at_once_are_of_neither(shop):
    good, bad = shop.bake("good"), shop.bake("bad")
    for pair in ((good, bad), (bad, good)):
        one, other = map(shop.blob, pair)
        shop.plant(bad, passed(one, statements.image_resource(other)))
    assert shop.rows(bad).get("gate", (False, ""))[0] is not True


def test_a_failed_result_is_not_outvoted(shop):
    orders = (("PASSED", "FAILED"), ("FAILED", "PASSED"), ("WARNED", "FAILED"))
    for number, order in enumerate(orders):
        name = shop.bake(f"app{number}")
        shop.state(name, *(passed(shop.blob(name), result=result) for result in order))
        assert shop.rows(name)["gate"][0] is False


@pytest.mark.parametrize("kind", ["merge", "quantize", "unmerged", "split", "bake", "rebase"])
def test_steps_of_another_image_are_no_evidence(shop, kind):
    """Signed statements of another image's steps are a finding, and change no other answer."""
    name, other = shop.bake("app"), shop.bake("other")
    before = shop.rows(name)
    x = statements.Resource(name="x", digest=Digest.of(b"x"))
    about = statements.image_resource(shop.blob(other)) if kind in ("bake", "rebase") else x
    shop.plant(name, statements.provenance(kind, [about], parameters={}, dependencies=[x]))
    after = shop.rows(name)
    assert after.pop("statement provenance/v1")[0] is False
    del before["statement provenance/v1"]
    assert after == before


def test_a_scan_of_another_image_is_no_evidence(shop):
    """What the key states in others' words of another image does not count here either."""
    name, other = shop.bake("app"), shop.bake("other")
    kind = "https://cosign.sigstore.dev/attestation/vuln/v1"
    told = statements.statement([statements.image_resource(shop.blob(other))], kind, {})
    for one in (name, other):
        shop.plant(one, told)
    assert shop.rows(other)["statement vuln/v1"] == (True, "signed by this key")
    assert shop.rows(name)["statement vuln/v1"][0] is False


def test_scores_go_along_when_an_image_is_rebased_and_not_back(shop):
    """The result of the image that a rebase names counts; a later one's counts for no other."""
    name = shop.bake("app")
    shop.state(name, passed(shop.blob(name)))
    to = shop.rebase(name)
    ok, found = shop.rows(to)["gate"]
    assert ok is None
    assert f"PASSED is of {shop.blob(name).digest.short}" in found
    plain = shop.bake("plain")
    shop.plant(plain, passed(shop.blob(to)), *shop.stated(to))
    assert shop.rows(plain).get("gate", (False, ""))[0] is not True


def test_questions_of_somebody_else_are_not_asked_again(shop):
    """An evaluation that no statement names is a finding, and a scan by others is not."""
    name = shop.bake("app")
    for kind, title, wanted in (
        (EVALUATION_TYPE, "evaluation.json", False),
        ("application/vnd.cyclonedx+json", "model.cdx.json", False),
        ("application/sarif+json", "scan.sarif", None),
    ):
        shop.hang(name, kind, AttachmentPart.of_bytes(b"{}", kind, **{TITLE: title}))
        assert shop.rows(name)[f"document {title}"][0] is wanted


def hung_otherwise(shop: Shop, name: str, changed: Callable[[Attachment], Attachment]) -> None:
    """Replace the list of an image's attachments by one of others with the same content."""
    place, image = shop.place(name), shop.blob(name)
    held = [place.read(blob, tag) for blob, tag in place.attached(image.digest)]
    shop.fake.manifests.pop((place.reference.repository, f"sha256-{image.digest.hex}"))
    place.attach(*(changed(replace(one, raw=None)) for one in held))


@pytest.mark.parametrize("kind", ["x/y", EVALUATION_TYPE])
def test_a_document_that_hangs_there_as_something_else(shop, kind):
    """A signature covers what a document is: a bill under another type is not the one stated."""
    name = shop.bake("app")

    def changed(one: Attachment) -> Attachment:
        return replace(one, artifact_type=kind) if one.artifact_type == MEDIA_TYPE else one

    assert shop.rows(name)["documents"][0]
    hung_otherwise(shop, name, changed)
    assert shop.rows(name)["documents"] == (False, "missing or changed: model.cdx.json")
    assert shop.rows(name)["document model.cdx.json"][0] is False


def test_adapters_that_changed_places(shop):
    """The order of adapters is signed, and so are two bills of the same name."""
    name = shop.bake("app")
    place, image = shop.place(name), shop.blob(name)
    told = next(one for one in shop.stated(name) if one.kind == "bake")
    there = tuple(
        Attachment(
            artifact_type=kind,
            parts=(AttachmentPart.of_bytes(title.encode() * n, kind, **{TITLE: title}),),
            annotations={NUMBER: str(n)} if kind == ADAPTER_TYPE else {},
        )
        for kind, title in ((ADAPTER_TYPE, "adapter.json"), (MEDIA_TYPE, "base.cdx.json"))
        for n in (0, 1)
    )
    made = statements.provenance(
        "bake",
        [statements.image_resource(image),
         *statements.layer_resources(place.image("linux/amd64"))],
        parameters={},
        dependencies=[statements.Resource(name=key, digest=Digest(digest))
                      for key, digest in told.dependencies.items()],
        byproducts=[*map(resource_of, there)],
    )  # fmt: skip
    for tag in (f"sha256-{image.digest.hex}", f"sha256-{image.digest.hex}.att"):
        shop.fake.manifests.pop((place.reference.repository, tag))
    evidence = Evidence(statements=(made,), documents=there)
    attach(evidence, image, "team", place, open_signer(str(shop.key)))
    names = "adapter:0, adapter:1, base.cdx.json, base.cdx.json"
    assert shop.rows(name)["documents"] == (True, names)

    def changed(one: Attachment) -> Attachment:
        number = one.annotations.get(NUMBER)
        return replace(one, annotations={NUMBER: str(1 - int(number))}) if number else one

    hung_otherwise(shop, name, changed)
    assert shop.rows(name)["documents"] == (False, "missing or changed: adapter:0, adapter:1")
    assert shop.rows(name)["document adapter:0"][0] is False


@pytest.mark.parametrize("kind", [ADAPTER_TYPE, EVALUATION_TYPE, MEDIA_TYPE, "x/y"])
def test_an_attachment_that_holds_nothing(shop, kind):
    """It is a finding where it takes the place of ours, and goes nowhere with the image."""
    name = shop.bake("app")
    shop.hang(name, kind, **{NUMBER: "\n../x"})
    called = "adapter:\n../x" if kind == ADAPTER_TYPE else kind
    ours = kind in (ADAPTER_TYPE, EVALUATION_TYPE)
    assert shop.rows(name)[f"document {called}"][0] is (False if ours else None)
    assert shop.rows(name)["documents"][0]
    assert f"document {called}" not in shop.rows(shop.rebase(name))


def test_results_on_an_index_are_of_no_image_in_it(shop):
    """Signed scores that hang on an index, or name it, are no evidence of what it lists."""
    name = shop.bake("app")
    image = shop.place(name).image("linux/amd64")
    arm = replace(image, settings={**image.settings, "architecture": "arm64"}, raw=None)
    whole = Index(images=(image, arm))
    all_of_it = Reference.parse(f"{shop.fake.host}/team/app:all")
    shop.client.push(whole, all_of_it)
    told = passed(image.manifest_blob)
    attached = signing.envelope_part(signing.sign_statement(told, open_signer(str(shop.key))), "x")
    RegistryLocation(shop.client, all_of_it).attach(
        Attachment(artifact_type="x", subject=whole.manifest_blob, parts=(attached,))
    )
    rows = shop.rows(str(all_of_it))
    assert rows["statement test-result/v0.1"][0] is False
    assert not any(check.endswith("gate") for check in rows)


def test_a_recipe_of_another_image_is_not_built_from(shop):
    """`build --from --key` takes its recipe from statements about this image alone."""
    name, other = shop.bake("app"), shop.bake("other")
    digest = Digest.of(b"x")
    weights = statements.Resource(name="m", digest=digest)
    told = statements.provenance(
        "bake",
        [statements.image_resource(shop.blob(other))],
        parameters={"recipe": {"base": {"source": "hf://evil/base"}}},
        dependencies=[weights],
    )
    merged = statements.provenance(
        "merge", [weights], parameters={}, dependencies=[replace(weights, name="base")]
    )
    shop.plant(name, told, merged)
    check = signing.read_public_key(shop.public)
    with pytest.raises(InputRefused, match=name):
        recipe_of_image(name, "hf://evil/base", check, shop.folder, shop.client, Silent())


@pytest.mark.parametrize("form", ["cosign", "bundle"])
def test_what_lies_at_the_destination_gets_no_signature(shop, form):
    """Statements are planted where an image will be pushed: only what comes with it is signed."""
    source, (mine, _) = shop.bake("app"), make_key(shop.folder, "mallory")
    to = f"{shop.fake.host}/prod/app:1"
    copy_image(source, to, shop.client, Silent(), force=False)
    forged = passed(shop.blob(to))
    told = next(one for one in shop.stated(source) if one.kind == "bake")
    predicate = {**told.predicate, "runDetails": {}}
    twisted = statements.Statement({**told.document, "predicate": predicate})
    shop.plant(to, forged, twisted, key=mine)
    shop.state(to, passed(shop.blob(to), result="better"), key=mine)
    release, public = make_key(shop.folder, "release")
    told_to_people = RecordingProgress()
    signer = replace(open_signer(str(release)), format=form)
    copy_image(source, to, shop.client, told_to_people, force=False, signer=signer)
    by_release = [one for one in shop.stated(to, public) if one.signed]
    assert [one.document for one in by_release] == [told.document]
    assert any("were already at the destination" in text for text in told_to_people.warnings)


def test_statements_of_another_image_at_the_source_get_no_signature(shop):
    """What hangs on the source and is about another image is not signed on the way, nor silent."""
    source, other = shop.bake("app"), shop.bake("other")
    shop.plant(source, passed(shop.blob(other)))
    release, public = make_key(shop.folder, "release")
    to, told = f"{shop.fake.host}/prod/app:1", RecordingProgress()
    copy_image(source, to, shop.client, told, force=False, signer=open_signer(str(release)))
    by_release = [one for one in shop.stated(to, public) if one.signed]
    assert [one.kind for one in by_release] == ["bake"]
    assert any("about another image" in text for text in told.warnings)


@pytest.mark.parametrize("command", ["bake", "rebase"])
def test_no_command_signs_what_others_left(shop, command):
    """`bake` and `rebase` sign what they made, and what the old image's own statements name."""
    source, other = shop.bake("app"), shop.bake("other")
    mine, _ = make_key(shop.folder, "mallory")
    release, public = make_key(shop.folder, "release")
    vuln = "https://cosign.sigstore.dev/attestation/vuln/v1"
    scan = statements.statement([statements.image_resource(shop.blob(source))], vuln, {})
    shop.plant(source, passed(shop.blob(other)), scan, key=mine)
    part = AttachmentPart.of_bytes(b'{"items": []}', EVALUATION_TYPE, **{TITLE: "evaluation.json"})
    shop.hang(source, EVALUATION_TYPE, part)
    to = shop.bake("app", release) if command == "bake" else shop.rebase(source, release)
    by_release = [one for one in shop.stated(to, public) if one.signed]
    assert {one.kind for one in by_release} <= {"bake", "rebase"}
    assert not any("evaluation.json" in one.byproducts for one in by_release)
