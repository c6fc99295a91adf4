"""Turns evidence into an image's attachments, signed in the formats that cosign reads.

cosign keeps all signatures of an image under one tag, and all statements under another. So what
others signed is read first and kept beside ours. Of bundles, cosign 3's form, each has a manifest.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress

from weightsmith.core.errors import InputRefused
from weightsmith.core.ports import AnySigner, IdentitySigner, Signer
from weightsmith.core.values import Blob, Digest
from weightsmith.oci.attachments import Attachment, AttachmentPart, fallback_tag
from weightsmith.oci.registry import ImageLocation
from weightsmith.provenance import signing
from weightsmith.provenance.chain import trace
from weightsmith.provenance.evidence import (
    STATEMENTS,
    Evidence,
    bundles_in,
    is_bundle,
    own_statements,
    read_attached,
    read_statement,
    signatures_in,
    statement_parts,
)
from weightsmith.provenance.statements import Statement
from weightsmith.provenance.withdrawal import withdrawn_in

_PREDICATE = "in-toto.io/predicate-type"
_COSIGN = (
    (signing.ENVELOPE_TYPE, signing.ENVELOPE_TYPE, ".att"),
    (signing.SIMPLE_SIGNING, signing.SIGNATURE_TYPE, ".sig"),
)
"""Media type of the parts, artifact type of their manifest, suffix of its tag."""


def attach(
    evidence: Evidence, image: Blob, name: str, location: ImageLocation, signer: AnySigner | None
) -> str | None:
    """Attach evidence to an image, signed if there is a key; `name` is its repository.

    Returns why a statement that is attached already withdraws the image, if one does; without a
    key, none is looked for. An image that is built again is the one that was withdrawn.
    """
    held = read_attached(location, image.digest) if signer else ()
    location.attach(*seal(evidence, image, name, signer, held))
    return withdrawn_by(own_statements(held), image.digest)


def attach_signed(
    stated: Sequence[Statement], image: Blob, place: ImageLocation, signer: AnySigner
) -> None:
    """Sign statements and attach them beside what others signed; the image gets no signature."""
    if isinstance(signer, IdentitySigner) or signer.format != "cosign":
        for one in stated:
            part = signing.sign_bundle(one, signer)
            place.attach(signing.bundle_manifest(part, image, one.predicate_type))
    if isinstance(signer, IdentitySigner) or signer.format == "bundle":
        return
    held = statement_parts(read_attached(place, image.digest))
    parts = [part for part in held if part.blob.media_type == signing.ENVELOPE_TYPE]
    own = [
        signing.envelope_part(signing.sign_statement(one, signer), one.predicate_type)
        for one in stated
    ]
    tag = fallback_tag(image.digest, ".att")
    place.attach(signing.cosign_manifest((*parts, *own), image, signing.ENVELOPE_TYPE, tag))


def seal(
    evidence: Evidence,
    image: Blob,
    name: str,
    signer: AnySigner | None,
    held: Sequence[Attachment] = (),
) -> tuple[Attachment, ...]:
    """Return the attachments with the evidence.

    With a key, all of our statements about the image are signed with it, including those signed
    before. The signatures and statements in `held` are kept and get no new signature.
    """
    documents = tuple(
        Attachment(
            artifact_type=document.artifact_type,
            subject=image,
            parts=document.parts,
            annotations=document.annotations,
        )
        for document in evidence.documents
    )
    parts = (*evidence.kept, *map(signing.statement_part, evidence.statements))
    bundles = tuple(
        signing.bundle_manifest(part, image, read_statement(part, None).predicate_type)
        for part in evidence.kept
        if is_bundle(part)
    )
    if signer is None:
        plain = (_one_statement(part, image) for part in parts if not is_bundle(part))
        return (*documents, *bundles, *plain)
    signed = _signed_with_held([*bundles, *held], parts, image, name, signer)
    return (*documents, *bundles, *signed)


def countersigned(
    attachments: Sequence[Attachment],
    image: Blob,
    name: str,
    signer: AnySigner | None,
    held: Sequence[Attachment] = (),
) -> tuple[Attachment, ...]:
    """Return an image's own attachments, joined with those `held` at its new location.

    Each statement occurs once, with all its signatures. With a key, our signature is added to the
    image and to its own statements about this image, but never to what is held, which anyone with
    write access may have put there.
    """
    both = (*attachments, *held)
    kinds_of = [{part.blob.media_type for part in a.parts} for a in both]
    if signer is None and not any(
        sum(kind in kinds for kinds in kinds_of) > 1 for kind, _, _ in _COSIGN
    ):
        return tuple(attachments)
    kinds = (*STATEMENTS, signing.SIMPLE_SIGNING)
    others = [a for a in attachments if not any(p.blob.media_type in kinds for p in a.parts)]
    parts = own_statements(attachments)
    return (*others, *_signed_with_held(both, parts, image, name, signer))


def unrelated_statements(parts: Sequence[AttachmentPart], image: Digest) -> list[str]:
    """Describe each of our statements that is not about the image."""
    stated = _readable(parts)
    lineage = trace(image, stated)
    return [
        lineage.describe_unrelated(one) for one in stated if one.is_ours and not lineage.holds(one)
    ]


def withdrawn_by(parts: Sequence[AttachmentPart], image: Digest) -> str | None:
    """Return why statements, signed or not, withdraw the image; None if they do not."""
    return withdrawn_in(_readable(parts), image)


def only_held(held: Sequence[AttachmentPart], parts: Sequence[AttachmentPart]) -> int:
    """Return how many of our statements are held that are not among the image's own."""
    own = {one.content for one in _readable(parts)}
    return len({one.content for one in _readable(held) if one.is_ours} - own)


def _signed_with_held(
    held: Sequence[Attachment],
    parts: Sequence[AttachmentPart],
    image: Blob,
    name: str,
    signer: AnySigner | None,
) -> Iterator[Attachment]:
    """Yield manifests with the signed parts and everything signed in `held`, except bundles."""
    envelopes = [p for p in statement_parts(held) if p.blob.media_type == signing.ENVELOPE_TYPE]
    stated = _readable(parts)
    lineage = trace(image.digest, stated)
    own = {one.content: one for one in stated if one.is_ours and lineage.holds(one)}
    statements, signatures = _joined([*parts, *envelopes]), signatures_in(held)
    if isinstance(signer, Signer) and signer.format != "bundle":
        statements = [
            _signed(part, signer) if _content(part) in own else part for part in statements
        ]
        signatures.append(signing.sign_image(image, name, signer, signatures))
    if signer and (isinstance(signer, IdentitySigner) or signer.format != "cosign"):
        plain = signing.STATEMENT_TYPE
        statements = [
            part
            for part in statements
            if part.blob.media_type != plain or _content(part) not in own
        ]
        yield from _bundles([signing.claim(image.digest), *own.values()], image, signer, held)
    found = [*statements, *signatures]
    unique = {(p.blob.digest, *sorted(p.annotations.items())): p for p in found}.values()
    # The manifests with envelopes and signatures, and one for each other statement.
    for part in unique:
        if part.blob.media_type == signing.STATEMENT_TYPE:
            yield _one_statement(part, image)
    for media_type, artifact_type, suffix in _COSIGN:
        if ours := tuple(part for part in unique if part.blob.media_type == media_type):
            tag = fallback_tag(image.digest, suffix)
            yield signing.cosign_manifest(ours, image, artifact_type, tag)


def _bundles(
    stated: Sequence[Statement], image: Blob, signer: AnySigner, held: Sequence[Attachment]
) -> Iterator[Attachment]:
    """Yield a bundle for each statement that this signer has not signed in one yet."""
    check, there = signing.check_of_signer(signer), set[bytes]()
    for part in bundles_in(held):
        with suppress(InputRefused):
            read = read_statement(part, check)
            if read.signed:
                there.add(read.content)
    for one in stated:
        if one.content not in there:
            part = signing.sign_bundle(one, signer)
            yield signing.bundle_manifest(part, image, one.predicate_type)


def _joined(parts: Iterable[AttachmentPart]) -> list[AttachmentPart]:
    """Return each statement once, with the signatures of all its envelopes."""
    groups: dict[bytes, list[AttachmentPart]] = {}
    for part in parts:
        groups.setdefault(_content(part), []).append(part)
    found = []
    for group in groups.values():
        unique = {part.blob.digest: part for part in group}.values()
        sealed = [part for part in unique if part.blob.media_type == signing.ENVELOPE_TYPE]
        kind = group[0].annotations.get("predicateType", "")
        found.append(
            signing.envelope_part(signing.join([part.read() for part in sealed]), kind)
            if len(sealed) > 1
            else (*sealed, *group)[0]
        )
    return found


def _readable(parts: Sequence[AttachmentPart]) -> list[Statement]:
    found = []
    for part in parts:
        with suppress(InputRefused):
            found.append(read_statement(part, None))
    return found


def _content(part: AttachmentPart) -> bytes:
    """Return a statement's content; its digest if it is someone else's and unreadable."""
    try:
        return read_statement(part, None).content
    except InputRefused:
        return part.blob.digest.encode()


def _signed(part: AttachmentPart, signer: Signer) -> AttachmentPart:
    statement = read_statement(part, None)
    kind = statement.predicate_type
    if part.blob.media_type == signing.ENVELOPE_TYPE:
        return signing.envelope_part(signing.countersign(part.read(), signer), kind)
    return signing.envelope_part(signing.sign_statement(statement, signer), kind)


def cosign_tag(attachment: Attachment) -> str:
    """Return the tag under which cosign looks for an attachment of this kind, or empty."""
    if attachment.tag:
        return attachment.tag
    kinds = {part.blob.media_type for part in attachment.parts}
    suffix = next((suffix for kind, _, suffix in _COSIGN if kind in kinds), "")
    return fallback_tag(attachment.subject.digest, suffix) if suffix else ""


def _one_statement(part: AttachmentPart, image: Blob) -> Attachment:
    notes = {_PREDICATE: part.annotations.get("predicateType", "")}
    return Attachment(
        artifact_type=part.blob.media_type, subject=image, parts=(part,), annotations=notes
    )
