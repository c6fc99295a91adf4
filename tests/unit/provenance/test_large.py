"""Statements as large as an engine's bill of materials are read, signed and joined."""

from __future__ import annotations

import json

import pytest
from weightsmith.api.commands.recipes import _with_questions
from weightsmith.core.ports import Silent
from weightsmith.core.values import Blob, Digest
from weightsmith.oci.attachments import Attachment, AttachmentPart
from weightsmith.provenance import bills, evidence, signing
from weightsmith.provenance.statements import Statement
from weightsmith.steps.destinations import layers_in

from tests.fakes.images import entry, foreign_image, tar_of
from tests.fakes.memory import new_signer
from tests.fakes.records import BUILD

LARGE = "x" * (18 << 20)
STATEMENT = Statement(
    {"predicateType": "https://spdx.dev/Document", "predicate": {"comment": LARGE}}
)


@pytest.mark.slow
def test_a_large_statement_is_read_and_signed_again_however_it_is_kept():
    key = new_signer()
    check = signing.check_by(key.public)
    envelope = signing.sign_statement(STATEMENT, key)
    kept = [
        (STATEMENT.content, signing.STATEMENT_TYPE, False),
        (envelope, signing.ENVELOPE_TYPE, True),
        (b'{"dsseEnvelope": %s}' % envelope, signing.BUNDLE_TYPE, True),
    ]
    for data, kind, signed in kept:
        read = evidence.read_statement(AttachmentPart.of_bytes(data, kind), check)
        assert (read.document, read.signed) == (STATEMENT.document, signed)
    second = new_signer()
    both = signing.countersign(envelope, second)
    for one in (key, second):
        assert signing.open_envelope(both, signing.check_by(one.public)).signed


@pytest.mark.slow
def test_a_large_bill_beside_a_base_is_found():
    part = AttachmentPart.of_bytes(
        STATEMENT.content,
        signing.STATEMENT_TYPE,
        **{"in-toto.io/predicate-type": "https://spdx.dev/Document"},
    )
    found = list(bills._stated(Attachment(artifact_type="", parts=(part,))))
    assert [document.parts[0].title for document in found] == ["base.spdx.json"]


@pytest.mark.slow
def test_a_large_attached_evaluation_keeps_its_questions(tmp_path):
    rows = [{"prompt": f"{n}{LARGE[: 1 << 19]}", "expected": "y"} for n in range(36)]
    kind = evidence.EVALUATION_TYPE
    part = AttachmentPart.of_bytes(json.dumps({"items": rows}).encode(), kind)
    subject = Blob(digest=Digest.of(b""), size=0, media_type="")
    document = Attachment(artifact_type=kind, subject=subject, parts=(part,))
    _with_questions({"evaluate": {}}, [document], tmp_path, Silent())
    lines = (tmp_path / "eval.jsonl").read_text("utf-8").splitlines()
    assert [*map(json.loads, lines)] == rows


@pytest.mark.slow
def test_a_large_record_of_a_build_is_known_again(tmp_path):
    image = foreign_image(tar_of((entry("a"), b"")))
    layers = [{"digest": x.digest, "size": x.size, "file": x.file} for x in image.layers]
    recorded = {"reference": "", "digest": image.digest, "layers": layers}
    document = {**BUILD, "image": recorded, "answers": LARGE}
    (tmp_path / "build.json").write_text(json.dumps(document))
    assert layers_in(tmp_path) == tuple(layer.digest for layer in image.layers)
