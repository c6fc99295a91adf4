"""An image's evidence: as collected by a build, and as read back from its attachments.

With a key, each statement is signed, in an envelope that cosign reads; without one, it is plain.
All other documents (bills of materials, the evaluation, adapters) are named by digest in the
image's statement, so its signature covers them too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from weightsmith.core.errors import InputRefused
from weightsmith.core.safe_parse import PART, parse
from weightsmith.core.values import Blob, Digest, FileEntry, JsonValue, canonical, tree_digest
from weightsmith.oci.attachments import Attachment, AttachmentPart
from weightsmith.oci.layers import TITLE
from weightsmith.oci.registry import ImageLocation
from weightsmith.provenance import signing
from weightsmith.provenance.statements import Resource, Statement

EVALUATION_TYPE = "application/vnd.weightsmith.evaluation.v1+json"
ADAPTER_TYPE = "application/vnd.weightsmith.adapter.v1"
UNMERGED = "unmerged"
"""The kind of a statement about a base with adapters beside it."""
DRAFTED = "draft"
"""The kind of a statement about weights with what drafts for them beside them."""
NUMBER = "dev.weightsmith.number"
"""Annotation of an adapter: its position in the merge order, from 0."""
SPDX_TYPE = "application/spdx+json"
STATEMENTS = (signing.STATEMENT_TYPE, signing.ENVELOPE_TYPE)
_MOST_ATTACHED = 1000


def titled(artifact_type: str, title: str, content: JsonValue) -> Attachment:
    """Return a document of one JSON file."""
    part = AttachmentPart.of_bytes(canonical(content), artifact_type, **{TITLE: title})
    return Attachment(artifact_type=artifact_type, parts=(part,), annotations={TITLE: title})


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """Everything that is attached to an image."""

    statements: tuple[Statement, ...] = ()
    """Made and signed by this build."""
    kept: tuple[AttachmentPart, ...] = ()
    """Those of the image that this one was made from."""
    documents: tuple[Attachment, ...] = ()


def read_attached(location: ImageLocation, image: Digest) -> list[Attachment]:
    """Return an image's attachments; their parts are read on demand."""
    return [location.read(blob, tag) for blob, tag in limited(location.attached(image))]


def signatures_in(attachments: Iterable[Attachment]) -> list[AttachmentPart]:
    """Return the signed claims about image digests."""
    parts = (part for attachment in attachments for part in attachment.parts)
    return [part for part in parts if part.blob.media_type == signing.SIMPLE_SIGNING]


def claims_in(attachments: Sequence[Attachment], check: signing.Check | None) -> list[str]:
    """Return the image digest that each signature is for; empty if the key did not sign it.

    Raises InputRefused for a malformed signature. Bundles without such a claim are skipped.
    """
    found = [signing.signed_digest(part, check) for part in signatures_in(attachments)]
    for part in bundles_in(attachments):
        try:
            read = read_statement(part, check)
        except InputRefused:
            continue
        if is_claim(read):
            found += read.subjects.values() if read.signed else [""]
    return found


def is_claim(statement: Statement) -> bool:
    """Say whether a statement is only cosign 3's signature of an image."""
    return statement.predicate_type == signing.SIGN_PREDICATE


def bundles_in(attachments: Iterable[Attachment]) -> list[AttachmentPart]:
    """Return Sigstore bundles, each once: statements, and cosign 3's signatures."""
    parts = (part for attachment in attachments for part in attachment.parts)
    return list({part.blob.digest: part for part in parts if is_bundle(part)}.values())


def is_bundle(part: AttachmentPart) -> bool:
    """Say whether a part is a Sigstore bundle."""
    return part.blob.media_type.startswith(signing.BUNDLE_TYPE)


def read_statement(part: AttachmentPart, check: signing.Check | None) -> Statement:
    """Return a statement, plain, in an envelope or in a bundle; raises InputRefused otherwise."""
    data = part.read()
    if is_bundle(part):
        return signing.open_bundle(data, check)
    if part.blob.media_type == signing.ENVELOPE_TYPE:
        return signing.open_envelope(data, check)
    try:
        plain = parse(data, largest=PART, unique=True)
    except ValueError:
        plain = None
    if not isinstance(plain, dict):
        raise InputRefused(
            "a statement is not a JSON object", hint="the image is damaged; push or write it again"
        )
    return Statement(plain)


def statement_parts(attachments: Iterable[Attachment]) -> list[AttachmentPart]:
    """Return the statements, each once."""
    parts = (part for attachment in attachments for part in attachment.parts)
    found = {part.blob.digest: part for part in parts if part.blob.media_type in STATEMENTS}
    return list(found.values())


def own_statements(attachments: Iterable[Attachment]) -> list[AttachmentPart]:
    """Return the statements, each once: also those in bundles, if they are of our kinds."""
    held = list(attachments)
    found = statement_parts(held)
    for part in bundles_in(held):
        with suppress(InputRefused):  # what others hang there may be anything
            if read_statement(part, None).is_ours:
                found.append(part)
    return found


def documents_in(attachments: Iterable[Attachment]) -> list[Attachment]:
    """Return all attachments that are neither statements nor signatures."""
    return [
        attachment
        for attachment in attachments
        if not any(
            part.blob.media_type in (*STATEMENTS, signing.SIMPLE_SIGNING) or is_bundle(part)
            for part in attachment.parts
        )
    ]


def limited(rows: Sequence[tuple[Blob, str]]) -> Sequence[tuple[Blob, str]]:
    """Return the rows; raises InputRefused if there are implausibly many attachments."""
    if len(rows) > _MOST_ATTACHED:
        raise InputRefused(
            f"too many manifests are attached to the image: {len(rows)}",
            hint="delete unneeded ones in the registry",
        )
    return rows


def document_name(document: Attachment) -> str:
    """Return a document's name in statements: its file name, or the adapter's number."""
    number = document.annotations.get(NUMBER)
    if document.artifact_type == ADAPTER_TYPE:
        return f"adapter:{number or 0}"
    # Others may attach an artifact that holds nothing.
    return next((part.title for part in document.parts), "") or document.artifact_type


def resource_of(document: Attachment) -> Resource:
    """Return a document as statements name it; another name or type is another document."""
    return Resource(
        name=document_name(document),
        digest=document_digest(document),
        media_type=document.artifact_type,
    )


def document_digest(document: Attachment) -> Digest:
    """Return a document's digest: its only part's, or that of the list of its parts."""
    if len(document.parts) == 1 and document.artifact_type != ADAPTER_TYPE:
        return document.parts[0].blob.digest
    return tree_digest(
        FileEntry(path=part.title, size=part.blob.size, digest=part.blob.digest)
        for part in document.parts
    )
