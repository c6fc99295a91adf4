"""`affected --withdraw`: a signed statement that `verify` honours; nothing is deleted."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from weightsmith.api.commands.affected import (
    affected_text,
    find_affected,
    keys_of,
    warn_of_other_keys,
    withdraw_all,
)
from weightsmith.api.commands.images import copy_image
from weightsmith.api.commands.rebase import rebase_image
from weightsmith.api.commands.requests import AffectedCommand, RebaseCommand
from weightsmith.api.commands.verify import verify_image
from weightsmith.api.results import Affected
from weightsmith.core.errors import CheckFailed, UsageError
from weightsmith.core.ports import Silent
from weightsmith.core.values import Blob, Digest
from weightsmith.oci import manifests
from weightsmith.oci.attachments import fallback_tag
from weightsmith.oci.references import Reference
from weightsmith.oci.registry import RegistryLocation
from weightsmith.outside.signer import open_signer
from weightsmith.provenance import signing
from weightsmith.provenance.evidence import (
    Evidence,
    read_attached,
    read_statement,
    statement_parts,
)
from weightsmith.provenance.origins import wanted
from weightsmith.provenance.sealing import attach, attach_signed
from weightsmith.provenance.statements import TEST_RESULT, WITHDRAWAL, Statement
from weightsmith.provenance.withdrawal import failed_result, withdrawal

from tests.fakes.baking import bake, make_key, push_base
from tests.fakes.journal import RecordingProgress
from tests.fakes.memory import memory_tools
from tests.unit.api.commands.conftest import ENGINE, Scene


@pytest.fixture
def told() -> RecordingProgress:
    return RecordingProgress()


def found(scene: Scene, key: Path | None = None, place: str = "team/app:1") -> Affected:
    keys = {"key": signing.read_public_key(key or scene.public)}
    where = [f"{scene.fake.host}/{place}"]
    return find_affected(wanted("engine", "llamacpp"), where, keys, scene.client, Silent())


def withdraw(scene: Scene, reason: str = "trained on the wrong data") -> Affected:
    signer = open_signer(str(scene.key))
    return withdraw_all(found(scene), reason, signer, scene.client, Silent())


def failed(scene: Scene, key: Path | None = None, name: str = "") -> dict[str, tuple[object, str]]:
    """Return the checks that say something of a withdrawal, and those that failed."""
    try:
        rows = verify_image(name or scene.name, key or scene.public, scene.client, Silent()).checks
        checks = {one.name: (one.ok, one.found) for one in rows}
    except CheckFailed as error:
        checks = {row["check"]: (row["ok"], row["found"]) for row in error.details["checks"]}
    return {k: v for k, v in checks.items() if v[0] is False or k == "withdrawn"}


def test_verify_refuses_what_was_withdrawn_and_says_why(scene: Scene) -> None:
    before = dict(scene.fake.manifests)
    after = withdraw(scene)

    assert "trained on the wrong data" in str(after.images[0].withdrawn)
    assert set(failed(scene)) == {"withdrawn", "gate"}
    with pytest.raises(CheckFailed, match="trained on the wrong data") as caught:
        verify_image(scene.name, scene.public, scene.client, Silent())
    assert caught.value.exit_code == 4
    with pytest.raises(CheckFailed, match="wrong data"):
        verify_image(scene.name, None, scene.client, Silent())
    # Only lists of what is attached have changed.
    now = scene.fake.manifests
    changed = {name for place, name in before if now.get((place, name)) != before[place, name]}
    digest = found(scene).images[0].digest
    assert changed <= {fallback_tag(Digest(digest)), fallback_tag(Digest(digest), ".att")}
    assert found(scene).images[0].withdrawn == after.images[0].withdrawn


def test_the_statement_is_in_toto_and_under_cosigns_tag(scene: Scene) -> None:
    withdraw(scene)
    digest = Digest(found(scene).images[0].digest)
    _, body = scene.fake.manifests["team/app", fallback_tag(digest, ".att")]
    kinds = {}
    for layer in json.loads(body)["layers"]:
        envelope = json.loads(scene.fake.blobs["team/app", layer["digest"]])
        stated = json.loads(base64.b64decode(envelope["payload"]))
        kinds[layer["annotations"]["predicateType"]] = stated
    assert len(kinds) > 1
    told = kinds[WITHDRAWAL]
    assert told["_type"] == "https://in-toto.io/Statement/v1"
    assert told["subject"][0]["digest"] == {"sha256": digest.hex}
    assert told["predicate"]["madeFrom"] == {"engine": "llamacpp"}
    assert set(told["predicate"]) == {"reason", "withdrawnOn", "madeFrom"}


@pytest.mark.parametrize("form", ["bundle", "both"])
def test_a_withdrawal_as_a_bundle_is_honoured_too(scene: Scene, form: Any) -> None:
    signer = replace(open_signer(str(scene.key)), format=form)
    withdraw_all(found(scene), "in a bundle", signer, scene.client, Silent())
    assert "in a bundle" in failed(scene)["withdrawn"][1]
    assert "in a bundle" in str(found(scene).images[0].withdrawn)


def test_policies_see_a_test_that_failed(scene: Scene) -> None:
    """They hold every test result to `PASSED`, and cannot ask for what is not there."""
    withdraw(scene)
    place = RegistryLocation(scene.client, Reference.parse(scene.name))
    digest = Digest(found(scene).images[0].digest)
    check = signing.read_public_key(scene.public)
    stated = [read_statement(part, check) for part in statement_parts(read_attached(place, digest))]
    (result,) = [one for one in stated if one.predicate_type == TEST_RESULT]
    assert result.signed
    assert result.image == digest
    assert result.predicate["result"] == "FAILED"
    assert result.predicate["failedTests"] == ["withdrawn: trained on the wrong data"]


def test_withdrawing_again_adds_nothing(scene: Scene, told: RecordingProgress) -> None:
    withdraw(scene)
    before = dict(scene.fake.manifests)
    signer = open_signer(str(scene.key))
    again = withdraw_all(found(scene), "another reason", signer, scene.client, told)
    assert scene.fake.manifests == before
    assert "wrong data" in str(again.images[0].withdrawn)
    assert "1 images were withdrawn before, and keep their reason" in told.said


def test_it_says_if_there_is_nothing_to_withdraw(scene: Scene, told: RecordingProgress) -> None:
    where = [f"{scene.fake.host}/team"]
    none = find_affected(wanted("engine", "vllm"), where, {}, scene.client, Silent())
    withdraw_all(none, "", open_signer(str(scene.key)), scene.client, told)
    assert told.warnings == ["nothing was found, so nothing is withdrawn"]


def test_who_withdraws_with_another_key_than_vouches_is_told(
    scene: Scene, told: RecordingProgress
) -> None:
    """Whoever checks with the image's own key does not honour it."""
    other, public = make_key(scene.folder, "other")
    names = {"key.pub": scene.public, "other.pub": public}
    keys = {name: signing.read_public_key(path) for name, path in names.items()}
    where = [f"{scene.fake.host}/team"]
    rows = find_affected(wanted("engine", "llamacpp"), where, keys, scene.client, Silent())

    warn_of_other_keys(rows, keys, open_signer(str(scene.key)), told)
    assert told.warnings == []
    warn_of_other_keys(rows, keys, open_signer(str(other)), told)
    assert "signed by key.pub, and not by the key that withdraws them" in told.warnings[0]


def test_what_another_key_withdrew_is_shown_and_not_honoured(scene: Scene) -> None:
    other, public = make_key(scene.folder, "other")
    place = RegistryLocation(scene.client, Reference.parse(scene.name))
    image = scene.image().manifest_blob
    told = withdrawal(image, "a joke", {})
    attach_signed((told, failed_result(told, image)), image, place, open_signer(str(other)))

    ok, said = failed(scene)["withdrawn"]

    assert (ok, "not signed by this key: a joke" in said) == (None, True)
    assert failed(scene, public)["withdrawn"][0] is False
    assert found(scene).images[0].withdrawn is None


def test_what_nobody_signed_is_not_withdrawn(scene: Scene, told: RecordingProgress) -> None:
    """Else whoever can write to a repository would have us withdraw any image."""
    name = f"{scene.fake.host}/team/free:1"
    bake(scene.client, scene.model, scene.base, push=name)
    rows = found(scene, place="team/free:1")
    before = dict(scene.fake.manifests)

    withdraw_all(rows, "", open_signer(str(scene.key)), scene.client, told)

    assert (len(rows.images), len(rows.unsigned)) == (0, 1)
    assert scene.fake.manifests == before
    assert "not withdrawn" in told.warnings[0]


def test_a_copy_that_is_signed_anew_stays_withdrawn(scene: Scene) -> None:
    withdraw(scene)
    other, public = make_key(scene.folder, "release")
    to = f"{scene.fake.host}/prod/app:1"
    signer = open_signer(str(other))
    copy_image(scene.name, to, scene.client, Silent(), force=False, signer=signer)
    assert failed(scene, public, to)["withdrawn"][0] is False


def test_a_rebased_image_is_another(scene: Scene, told: RecordingProgress) -> None:
    withdraw(scene)
    onto, to = f"{scene.fake.host}/base/engine:2", f"{scene.fake.host}/team/app:2"
    push_base(scene.client, onto, ENGINE, {"app/llama-server": b"2"})
    tools = memory_tools(scene.folder, registry=scene.client, key=scene.key)
    request = RebaseCommand(source=scene.name, onto=onto, to=to, smoke=False)
    rebase_image(request, replace(tools, progress=told))
    assert any("was withdrawn" in text for text in told.warnings)
    assert failed(scene, name=to) == {}


def test_a_signed_withdrawal_moved_to_another_image_does_not_count(scene: Scene) -> None:
    other = f"{scene.fake.host}/team/other:1"
    (scene.model / "config.json").write_text((scene.model / "config.json").read_text() + " ")
    bake(scene.client, scene.model, scene.base, scene.key, push=other, name="renamed")
    withdraw(scene)
    here = RegistryLocation(scene.client, Reference.parse(scene.name))
    there = RegistryLocation(scene.client, Reference.parse(other))
    image = scene.image("team/other:1").manifest_blob
    for blob, tag in here.attached(scene.image().digest):
        held = here.read(blob, tag)
        for part in statement_parts([held]):
            if part.annotations.get("predicateType") == WITHDRAWAL:
                kind = part.blob.media_type
                made = type(held)(artifact_type=kind, subject=image, parts=(part,))
                there.attach(made)
    assert "withdrawn" not in failed(scene, name=other)
    assert found(scene, place="team/other:1").images[0].withdrawn is None


def test_another_tag_of_what_was_withdrawn_is_withdrawn(scene: Scene) -> None:
    again, name = bytes(scene.image().manifest_bytes), f"{scene.fake.host}/team/app:fresh"
    withdraw(scene)
    there, kind = Reference.parse(name), scene.image().manifest_blob.media_type
    scene.client.push_manifest(there, again, kind, [])
    assert failed(scene, name=name)["withdrawn"][0] is False
    assert {*found(scene, place="team/app").images[0].tags} == {"1", "fresh"}


@pytest.mark.parametrize("nested", [False, True])
def test_an_index_that_lists_what_was_withdrawn_is_refused(scene: Scene, nested: bool) -> None:
    """It is signed afterwards, and has no withdrawal of its own."""
    withdraw(scene)
    image, place = scene.image(), Reference.parse(f"{scene.fake.host}/team/app:all")
    where = {"platform": {"os": "linux", "architecture": "amd64"}}
    rows = [{**manifests.described(image.manifest_blob), **where}]
    body = manifests.index_of(rows)
    if nested:
        scene.client.push_manifest(place.at(Digest.of(body)), body, manifests.OCI_INDEX, [])
        inner = Blob(digest=Digest.of(body), size=len(body), media_type=manifests.OCI_INDEX)
        body = manifests.index_of([manifests.described(inner)])
    scene.client.push_manifest(place, body, manifests.OCI_INDEX, [])
    whole = Blob(digest=Digest.of(body), size=len(body), media_type=manifests.OCI_INDEX)
    signer = open_signer(str(scene.key))
    attach(Evidence(), whole, "app", RegistryLocation(scene.client, place), signer)

    said = failed(scene, name=str(place))

    assert any("wrong data" in found for _, found in said.values())
    answer = found(scene, place="team/app")
    indexes = [row for row in (*answer.images, *answer.unsigned) if row.form == "index"]
    assert len(indexes) == 1 + nested
    for row in indexes:
        assert (row.withdrawn, row.withdrawn_members) == (None, row.members)
    assert affected_text(answer).count("WITHDRAWN of it: sha256:") == len(indexes)


def test_an_index_is_marked_as_its_images_are_withdrawn(scene: Scene) -> None:
    """It is not signed, so it gets no withdrawal of its own."""
    image, place = scene.image(), Reference.parse(f"{scene.fake.host}/team/app:all")
    body = manifests.index_of([manifests.described(image.manifest_blob)])
    scene.client.push_manifest(place, body, manifests.OCI_INDEX, [])
    before = found(scene, place="team/app")
    signer = open_signer(str(scene.key))
    after = withdraw_all(before, "wrong data", signer, scene.client, Silent())
    assert [row.withdrawn_members for row in before.unsigned] == [()]
    assert [row.withdrawn_members for row in after.unsigned] == [(image.digest,)]
    (again,) = found(scene, place="team/app").unsigned
    assert again.withdrawn_members == (image.digest,)


def test_a_withdrawal_of_several_images_counts_for_each(scene: Scene) -> None:
    """in-toto lets subjects share a name, as those of a digest alone do."""
    image = scene.image().manifest_blob
    told = withdrawal(image, "two at once", {}).document
    rows = [{**told["subject"][0], "digest": {"sha256": "0" * 64}}, *told["subject"]]
    place = RegistryLocation(scene.client, Reference.parse(scene.name))
    both = Statement({**told, "subject": rows})
    attach_signed((both,), image, place, open_signer(str(scene.key)))
    assert failed(scene)["withdrawn"][0] is False
    assert "two at once" in str(found(scene).images[0].withdrawn)


def test_who_copies_what_was_withdrawn_is_told(scene: Scene, told: RecordingProgress) -> None:
    withdraw(scene)
    to = f"{scene.fake.host}/prod/app:1"
    copy_image(scene.name, to, scene.client, told, force=False)
    assert ["trained on the wrong data" in text for text in told.warnings] == [True]


@pytest.mark.parametrize(
    "asked", [{"withdraw": True}, {"reason": "x"}, {"withdraw": True, "reason": "x"}]
)
def test_only_a_key_withdraws(asked: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        keys_of(AffectedCommand(in_=("x",), adapter="y", **asked), None)
