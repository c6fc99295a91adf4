"""Whoever may write to a repository wants our key's signature on it."""

from __future__ import annotations

import pytest
from weightsmith.api.commands.images import copy_image
from weightsmith.core.ports import Silent
from weightsmith.oci.attachments import AttachmentPart
from weightsmith.oci.layers import TITLE
from weightsmith.outside.signer import open_signer
from weightsmith.provenance import statements
from weightsmith.provenance.evidence import EVALUATION_TYPE

from tests.fakes.baking import make_key
from tests.fakes.journal import RecordingProgress
from tests.hostile.registry.shop import Shop, passed


def test_what_lies_at_the_destination_gets_no_signature(shop: Shop) -> None:
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
    signer = open_signer(str(release))
    copy_image(source, to, shop.client, told_to_people, force=False, signer=signer)
    by_release = [one for one in shop.stated(to, public) if one.signed]
    assert [one.document for one in by_release] == [told.document]
    assert any("were already at the destination" in text for text in told_to_people.warnings)


def test_statements_of_another_image_at_the_source_get_no_signature(shop: Shop) -> None:
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
def test_no_command_signs_what_others_left(shop: Shop, command: str) -> None:
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
