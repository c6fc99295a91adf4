"""JSON of an image: signatures, statements, labels."""

from __future__ import annotations

import base64

import pytest
from weightsmith.api.commands.recipes import _with_questions
from weightsmith.core.errors import InputRefused
from weightsmith.core.ports import Silent
from weightsmith.core.trees import below, discard
from weightsmith.models.folder import ignored_files
from weightsmith.oci.attachments import Attachment, AttachmentPart
from weightsmith.provenance import evidence, signing
from weightsmith.provenance.evidence import EVALUATION_TYPE
from weightsmith.provenance.labels import ADDED, LAYERS, plan_in, roles_of

from tests.fakes.images import entry, foreign_image, tar_of
from tests.fakes.users import nested

DEEP = b'{"a":' * 50_000 + b"1" + b"}" * 50_000
WRAPPED = base64.b64encode(DEEP)


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        (signing.STATEMENT_TYPE, DEEP),
        (signing.ENVELOPE_TYPE, DEEP),
        (signing.ENVELOPE_TYPE, b'{"payload": "%s", "signatures": []}' % WRAPPED),
        (signing.BUNDLE_TYPE, DEEP),
        (signing.BUNDLE_TYPE, b'{"dsseEnvelope": %s}' % DEEP),
        (signing.BUNDLE_TYPE, b'{"dsseEnvelope": {"payload": "%s"}}' % WRAPPED),
    ],
)
def test_deep_statements_are_refused(kind, data):
    with pytest.raises(InputRefused):
        evidence.read_statement(AttachmentPart.of_bytes(data, kind), lambda *_: True)


def test_a_deep_signature_is_nobodys():
    notes = {"dev.cosignproject.cosign/signature": "AAAA"}
    part = AttachmentPart.of_bytes(DEEP, signing.SIMPLE_SIGNING, **notes)
    assert signing.signed_digest(part, lambda *_: True) == ""


def test_deep_labels_say_nothing():
    labels = {LAYERS: "base:1", ADDED: DEEP.decode(), "dev.weightsmith.plan": DEEP.decode()}
    image = foreign_image(tar_of((entry("a"), b"")), config={"Labels": labels})
    assert plan_in(image.labels) == {}
    with pytest.raises(InputRefused, match=ADDED):
        roles_of(image, "x")


def test_an_attached_evaluation_of_another_shape_is_left_out(tmp_path):
    """The questions that an image brings are numbers: the recipe gets none."""
    part = AttachmentPart.of_bytes(b'{"items": [1, {"prompt": 2}]}', "")
    recipe = {"evaluate": {"data": "x"}}
    _with_questions(
        recipe, [Attachment(artifact_type=EVALUATION_TYPE, parts=(part,))], tmp_path, Silent()
    )
    assert recipe == {}


@pytest.mark.slow
def test_a_deep_folder_beside_a_model_is_passed_over(tmp_path):
    """A downloaded model has a hidden folder as deep as its author likes: it is not read."""
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / ".git").mkdir()
    nested(tmp_path / ".git", 1500)
    try:
        assert ignored_files(tmp_path) == ""
        assert tmp_path / ".git" / "deep" in below(tmp_path)
    finally:
        discard(tmp_path / ".git")
