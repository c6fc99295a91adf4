"""Withdraws images: a signed statement beside each says why; nothing is deleted.

It is an in-toto statement of the predicate type `WITHDRAWAL`, in the form of signatures that is
chosen, so that policies find it as they find the others. Its predicate has `reason`
(text), `withdrawnOn` (RFC 3339) and `madeFrom` (what the images have in common, such as
`{"adapter": "hf://acme/support-lora"}`). Its subject is the image, or the index.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime

from weightsmith.core.ports import Signer
from weightsmith.core.values import Blob, JsonValue
from weightsmith.oci.attachments import fallback_tag
from weightsmith.oci.registry import ImageLocation
from weightsmith.provenance import signing
from weightsmith.provenance.evidence import read_attached, statement_parts
from weightsmith.provenance.statements import WITHDRAWAL, Statement, image_resource, statement

_LONGEST = 500


def withdrawal(image: Blob, reason: str, made_from: Mapping[str, str]) -> Statement:
    """Return the statement that withdraws an image or an index now."""
    when = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    predicate: dict[str, JsonValue] = {"reason": reason, "withdrawnOn": when}
    if made_from:
        predicate["madeFrom"] = dict(made_from)
    return statement([image_resource(image)], WITHDRAWAL, predicate)


def attach_withdrawal(told: Statement, image: Blob, place: ImageLocation, signer: Signer) -> None:
    """Sign a withdrawal and attach it beside what others signed; the image gets no signature."""
    kind = told.predicate_type
    if signer.format != "cosign":
        place.attach(signing.bundle_manifest(signing.sign_bundle(told, signer), image, kind))
    if signer.format == "bundle":
        return
    held = read_attached(place, image.digest)
    parts = [p for p in statement_parts(held) if p.blob.media_type == signing.ENVELOPE_TYPE]
    own = signing.envelope_part(signing.sign_statement(told, signer), kind)
    tag = fallback_tag(image.digest, ".att")
    place.attach(signing.cosign_manifest((*parts, own), image, signing.ENVELOPE_TYPE, tag))


def withdrawn_in(stated: Iterable[Statement], image: str) -> str | None:
    """Return why statements withdraw an image, and since when; None if they do not."""
    for one in stated:
        if one.predicate_type == WITHDRAWAL and image in one.subjects.values():
            reason, when = one.predicate.get("reason"), one.predicate.get("withdrawnOn")
            said = reason if isinstance(reason, str) and reason else "no reason is stated"
            since = f" ({when[:20]})" if isinstance(when, str) and when else ""
            return said[:_LONGEST] + since
    return None
