"""Images that an identity signed: what `push`, `verify` and `affected` make of its bundles."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from weightsmith.api.commands.affected import find_affected, withdraw_all
from weightsmith.api.commands.images import copy_image
from weightsmith.api.commands.verify import verify_image
from weightsmith.core.errors import CheckFailed, UsageError
from weightsmith.core.ports import IdentitySigner, Silent
from weightsmith.oci.attachments import Attachment, AttachmentPart
from weightsmith.oci.references import Reference
from weightsmith.oci.registry import RegistryLocation
from weightsmith.outside.keyless import TOKEN, identity_check, open_identity_signer
from weightsmith.outside.signer import open_signer
from weightsmith.provenance import evidence, signing
from weightsmith.provenance.origins import wanted
from weightsmith.provenance.sealing import attach_signed
from weightsmith.provenance.statements import VSA, statement
from weightsmith.recipe.user_config import WantedIdentity

from tests.fakes.sigstore import ISSUER, WORKFLOW, Sigstore, sigstore, token
from tests.unit.api.commands.conftest import Scene


@dataclass
class Signed:
    """A registry with an image, and an identity that signed a copy of it."""

    scene: Scene
    services: Sigstore
    signer: IdentitySigner
    name: str

    def check(self, name: str = "", identity: str = WORKFLOW, **more: object) -> dict[str, str]:
        """Return what does not hold for an identity; {} where all does."""
        try:
            verify_image(
                name or self.name, None, self.scene.client, Silent(),
                signed_by=self.by(identity), **more,  # type: ignore[arg-type]
            )  # fmt: skip
        except CheckFailed as error:
            rows = error.details["checks"]
            return {row["check"]: row["found"] for row in rows if row["ok"] is False}
        return {}

    def by(self, identity: str = WORKFLOW) -> signing.Check:
        root = str(self.scene.folder / "root.json")
        return identity_check(
            WantedIdentity(
                certificate_identity=identity, certificate_oidc_issuer=ISSUER, trusted_root=root
            )
        )

    def place(self, name: str = "") -> RegistryLocation:
        return RegistryLocation(self.scene.client, Reference.parse(name or self.name))

    def attached(self, name: str = "") -> Sequence[Attachment]:
        place = self.place(name)
        return evidence.read_attached(place, place.image("linux/amd64").digest)


@pytest.fixture
def signed(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> Iterator[Signed]:
    monkeypatch.setenv(TOKEN, token())
    name = f"{scene.fake.host}/prod/app:1"
    with sigstore() as services:
        signer = open_identity_signer(str(services.write(scene.folder)[1]))
        copy_image(scene.name, name, scene.client, Silent(), force=False, signer=signer)
        yield Signed(scene, services, signer, name)


def test_an_identity_vouches_for_an_image(signed: Signed) -> None:
    assert signed.check() == {}
    # The key's signatures came along, and count as before.
    assert signed.scene.check(signed.name) == {}
    found = verify_image(signed.name, None, signed.scene.client, Silent(), signed_by=signed.by())
    said = {one.name: one.found for one in found.checks}
    assert said["signature"].endswith(f"by {WORKFLOW} of {ISSUER}")
    assert said["statement provenance/v1"] == f"signed by {WORKFLOW} of {ISSUER}"


def test_pushed_again_nothing_is_added(signed: Signed) -> None:
    before, entries = len(signed.attached()), len(signed.services.bodies)
    for name in (signed.scene.name, signed.name):
        copy_image(
            name, signed.name, signed.scene.client, Silent(), force=False, signer=signed.signer
        )
    assert (len(signed.attached()), len(signed.services.bodies)) == (before, entries)


def test_another_identity(signed: Signed) -> None:
    found = signed.check(identity="https://github.com/evil/models")
    assert f"signed by {WORKFLOW} of {ISSUER}" in found["signature"]
    assert f"signed by {WORKFLOW} of {ISSUER}" in found["statement provenance/v1"]
    assert "statement" in found


def test_no_identity_signed_it(signed: Signed) -> None:
    """A key's signature names no identity."""
    found = signed.check(signed.scene.name)
    assert found["signature"].startswith("1 found, none by")


def test_a_key_and_an_identity(signed: Signed) -> None:
    with pytest.raises(UsageError, match="exclude each other"):
        verify_image(
            signed.name, signed.scene.public, signed.scene.client, Silent(), signed_by=signed.by()
        )


def hang(signed: Signed, name: str, data: bytes) -> None:
    """Attach a bundle to an image, as anyone can who may write to its repository."""
    place = signed.place(name)
    image = place.image("linux/amd64").manifest_blob
    part = AttachmentPart.of_bytes(data, f"{signing.BUNDLE_TYPE}.v0.3+json")
    place.attach(signing.bundle_manifest(part, image, signing.SIGN_PREDICATE))


def bundles(signed: Signed) -> list[bytes]:
    return [part.read() for part in evidence.bundles_in(signed.attached())]


def other_image(signed: Signed) -> str:
    """Push an image of another digest that nobody signed."""
    scene = signed.scene
    image = scene.image()
    config = {**image.config, "Labels": {**image.labels, "more": "1"}}
    name = f"{scene.fake.host}/prod/other:1"
    changed = replace(image, settings={**image.settings, "config": config}, raw=None)
    scene.client.push(changed, Reference.parse(name))
    return name


def test_bundles_of_another_image(signed: Signed) -> None:
    """The identity signed them, and they say nothing about this image."""
    name = other_image(signed)
    for one in bundles(signed):
        hang(signed, name, one)
    found = signed.check(name)
    assert "but for another image" in found["signature"]
    assert "about another image" in found["statement"]


def test_a_bundle_that_two_readers_read_otherwise(signed: Signed) -> None:
    """What the library says to be signed is believed only if it is what we read."""
    made = bundles(signed)[0]
    check = replace(signed.signer.check, read=lambda _: (b"{}", ""))
    read = signing.open_bundle(made, check)
    assert (read.signed, read.fault) == (False, "it can be read in two ways")
    assert signing.open_bundle(made, signed.signer.check).signed


@pytest.mark.slow
def test_a_huge_bundle(signed: Signed) -> None:
    """It is what others hang there: it is not read, and nothing else suffers."""
    name = signed.name
    hang(signed, name, b'{"dsseEnvelope": ' + b" " * (65 << 20) + b"{}}")
    assert "signature" not in signed.check()


def test_what_an_identity_signed_is_found(signed: Signed) -> None:
    """`affected` believes it as it believes keys, and an identity withdraws too."""
    question = wanted("engine", "llamacpp")
    place = f"{signed.scene.fake.host}/prod"
    client = signed.scene.client
    keys = {"ci": signed.by()}
    found = find_affected(question, [place], keys, client, Silent())
    (row,) = found.images
    assert row.signed_by == ("ci",)
    assert row.built
    assert abs(datetime.now(UTC) - datetime.fromisoformat(row.built)) < timedelta(hours=1)
    assert row.dated == "transparency log"
    others = {"ci": signed.by("https://github.com/evil/models")}
    assert find_affected(question, [place], others, client, Silent()).images == ()
    withdraw_all(found, "leaks", signed.signer, client, Silent())
    assert signed.check()["withdrawn"].startswith("leaks")
    assert "withdrawn" not in signed.scene.check(signed.name)


def test_a_proof_of_an_identity(signed: Signed) -> None:
    place = signed.place()
    image = place.image("linux/amd64").manifest_blob
    subject = {
        "name": "image",
        "digest": {"sha256": image.digest.hex},
        "annotations": {"device": "nvidia-l4", "model": "NVIDIA L4"},
    }
    told = statement([], VSA, {}).document
    summary = {
        "verificationResult": "PASSED",
        "verifiedLevels": ["WEIGHTSMITH_PROVEN"],
        "timeVerified": "2026-01-01T00:00:00Z",
    }
    made = signing.Statement({**told, "subject": [subject], "predicate": summary})
    assert "proven on nvidia-l4" in signed.check(proven_on=("nvidia-l4",))
    attach_signed([made], image, place, signed.signer)
    assert signed.check(proven_on=("nvidia-l4",)) == {}


def test_a_key_signs_beside_an_identity(signed: Signed, tmp_path: Path) -> None:
    to = f"{signed.scene.fake.host}/both/app:1"
    key = open_signer(str(signed.scene.key))
    copy_image(signed.name, to, signed.scene.client, Silent(), force=False, signer=key)
    assert signed.check(to) == {}
    assert signed.scene.check(to) == {}
