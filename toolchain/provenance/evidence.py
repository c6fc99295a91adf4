"""What is known of an image, gathered, sealed into attachments, and read back.

Statements are signed one by one in the envelopes that cosign reads, or are plain without a key.
Everything else (bills of materials, the evaluation, adapters) is named by digest in the image's
own statement, so its signature covers them too.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from toolchain.errors import InputRefused
from toolchain.oci.attachments import Attachment, Part, fallback_tag
from toolchain.provenance import signing
from toolchain.provenance.statements import TEST_RESULT, kind_of
from toolchain.values import Blob, Digest, FileEntry, Json, canonical, tree_digest

EVALUATION_TYPE = "application/vnd.weightsmith.evaluation.v1+json"
ADAPTER_TYPE = "application/vnd.weightsmith.adapter.v1"
NUMBER = "dev.weightsmith.number"
"""Annotation of an adapter: its place in the order of merging, from 0."""
SPDX_TYPE = "application/spdx+json"
_PREDICATE = "in-toto.io/predicate-type"
_STATEMENTS = (signing.STATEMENT_TYPE, signing.ENVELOPE_TYPE)
_MOST_ATTACHED = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A file beside the image, by its kind."""

    artifact_type: str
    parts: tuple[Part, ...]
    annotations: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """All that goes beside an image."""

    statements: tuple[Mapping[str, Json], ...] = ()
    """Those that we make and sign."""
    kept: tuple[Part, ...] = ()
    """Those of the image that this one came from."""
    documents: tuple[Document, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """A statement as found."""

    statement: Mapping[str, Json]
    part: Part
    signed: bool
    """By the key that was asked for; False without a key."""


def seal(
    evidence: Evidence, image: Blob, name: str, sign: signing.Sign | None
) -> tuple[Attachment, ...]:
    """Return the attachments that hold the evidence; `name` is the image's repository.

    With a key, all statements of ours are signed by it, those that were signed before as well.
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
    if sign is None:
        return (*documents, *(_one_statement(part, image) for part in parts))
    signed = (*(_signed(part, sign) for part in parts), signing.sign_image(image, name, sign))
    return (*documents, *_of_cosign(signed, image))


def countersigned(
    attachments: Sequence[Attachment], image: Blob, name: str, sign: signing.Sign
) -> tuple[Attachment, ...]:
    """Return what hangs on an image with our signature added: to it, and to our statements."""
    kinds = (*_STATEMENTS, signing.SIMPLE_SIGNING)
    others = [a for a in attachments if not any(p.blob.media_type in kinds for p in a.parts)]
    parts = [_signed(part, sign) for part in _joined(statement_parts(attachments))]
    own = signing.sign_image(image, name, sign)
    signatures = (*signatures_in(attachments), own)
    unique = {(p.blob.digest, *sorted(p.annotations.items())): p for p in (*parts, *signatures)}
    return (*others, *_of_cosign(tuple(unique.values()), image))


def _joined(parts: Sequence[Part]) -> list[Part]:
    """Return each statement once, with the signatures of all its envelopes."""
    groups: dict[bytes, list[Part]] = {}
    for part in parts:
        groups.setdefault(canonical(read_statement(part, None).statement), []).append(part)
    found = []
    for group in groups.values():
        sealed = [part for part in group if part.blob.media_type == signing.ENVELOPE_TYPE]
        kind = group[0].annotations.get("predicateType", "")
        found.append(
            signing.envelope_part(signing.join([part.read() for part in sealed]), kind)
            if len(sealed) > 1
            else (*sealed, *group)[0]
        )
    return found


def _signed(part: Part, sign: signing.Sign) -> Part:
    """Return a statement of ours in an envelope with our signature; others' as they are."""
    told = read_statement(part, None).statement
    if not is_ours(told):
        return part
    kind = str(told["predicateType"])
    if part.blob.media_type == signing.ENVELOPE_TYPE:
        return signing.envelope_part(signing.countersign(part.read(), sign), kind)
    return signing.envelope_part(signing.sign_statement(told, sign), kind)


def _of_cosign(parts: Sequence[Part], image: Blob) -> Iterator[Attachment]:
    """Yield the manifests that hold envelopes and signatures, and one for each other statement."""
    kinds = (
        (signing.ENVELOPE_TYPE, signing.ENVELOPE_TYPE, ".att"),
        (signing.SIMPLE_SIGNING, signing.SIGNATURE_TYPE, ".sig"),
    )
    for part in parts:
        if part.blob.media_type == signing.STATEMENT_TYPE:
            yield _one_statement(part, image)
    for media_type, artifact_type, suffix in kinds:
        held = tuple(part for part in parts if part.blob.media_type == media_type)
        if held:
            tag = fallback_tag(image.digest, suffix)
            yield signing.cosign_manifest(held, image, artifact_type, tag)


def is_ours(told: Mapping[str, Json]) -> bool:
    """Say whether a statement is one that we make, so that our key has to vouch for it."""
    kinds = ("merge", "quantize", "split", "bake", "rebase")
    return told.get("predicateType") == TEST_RESULT or kind_of(told) in kinds


def signature_of(image: Blob, name: str, sign: signing.Sign) -> Attachment:
    """Return the signature of an image or an index, under the tag where cosign looks for it."""
    (found,) = _of_cosign((signing.sign_image(image, name, sign),), image)
    return found


def cosign_tag(attachment: Attachment) -> str:
    """Return the tag under which cosign looks for an attachment of this kind, or empty."""
    if attachment.tag:
        return attachment.tag
    kinds = {signing.SIGNATURE_TYPE: ".sig", signing.ENVELOPE_TYPE: ".att"}
    suffix = kinds.get(attachment.artifact_type, "")
    return fallback_tag(attachment.subject.digest, suffix) if suffix else ""


def signatures_in(attachments: Iterable[Attachment]) -> list[Part]:
    """Return the signed claims about image digests."""
    return [
        part
        for attachment in attachments
        for part in attachment.parts
        if part.blob.media_type == signing.SIMPLE_SIGNING
    ]


def read_statement(part: Part, check: signing.Check | None) -> Told:
    """Return a statement, plain or in an envelope; InputRefused for what is none."""
    data = part.read()
    if part.blob.media_type == signing.ENVELOPE_TYPE:
        told, signed = signing.open_envelope(data, check)
        return Told(statement=told, part=part, signed=signed)
    try:
        plain = json.loads(data)
    except (ValueError, RecursionError):
        plain = None
    if not isinstance(plain, dict):
        raise InputRefused("a statement is not a JSON object")
    return Told(statement=plain, part=part, signed=False)


def statement_parts(attachments: Iterable[Attachment]) -> list[Part]:
    """Return the statements, each once."""
    found = {
        part.blob.digest: part
        for attachment in attachments
        for part in attachment.parts
        if part.blob.media_type in _STATEMENTS
    }
    return list(found.values())


def documents_in(attachments: Iterable[Attachment]) -> list[Document]:
    """Return everything attached that is neither statement nor signature."""
    return [
        Document(
            artifact_type=attachment.artifact_type,
            parts=attachment.parts,
            annotations=attachment.annotations,
        )
        for attachment in attachments
        if not any(
            part.blob.media_type in (*_STATEMENTS, signing.SIMPLE_SIGNING)
            for part in attachment.parts
        )
    ]


def limited(rows: Sequence[tuple[Blob, str]]) -> Sequence[tuple[Blob, str]]:
    """Return the rows; InputRefused where more hangs on an image than anybody would attach."""
    if len(rows) > _MOST_ATTACHED:
        raise InputRefused(f"{len(rows)} manifests are attached to the image")
    return rows


def document_name(document: Document) -> str:
    """Return what statements call a document: its file's name, or which adapter it is."""
    number = document.annotations.get(NUMBER)
    if document.artifact_type == ADAPTER_TYPE:
        return f"adapter:{number or 0}"
    return document.parts[0].title or document.artifact_type


def document_digest(document: Document) -> Digest:
    """Return a document's content by digest: its only part's, or of the list of its parts."""
    if len(document.parts) == 1 and document.artifact_type != ADAPTER_TYPE:
        return document.parts[0].blob.digest
    return tree_digest(
        FileEntry(path=part.title, size=part.blob.size, digest=part.blob.digest)
        for part in document.parts
    )


def _one_statement(part: Part, image: Blob) -> Attachment:
    notes = {_PREDICATE: part.annotations.get("predicateType", "")}
    return Attachment(
        artifact_type=part.blob.media_type, subject=image, parts=(part,), annotations=notes
    )
