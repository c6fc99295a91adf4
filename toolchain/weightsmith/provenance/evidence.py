"""What is known of an image: as gathered, and as read back from what hangs on it.

Statements are signed one by one in the envelopes that cosign reads, or are plain without a key.
Everything else (bills of materials, the evaluation, adapters) is named by digest in the image's
own statement, so its signature covers them too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from weightsmith.errors import InputRefused
from weightsmith.foreign import PART, parse
from weightsmith.oci.attachments import Attachment, Part
from weightsmith.oci.manifests import TITLE
from weightsmith.oci.places import Place
from weightsmith.provenance import signing
from weightsmith.provenance.statements import TEST_RESULT, kind_of, subjects_of
from weightsmith.values import Blob, Digest, FileEntry, Json, canonical, tree_digest

EVALUATION_TYPE = "application/vnd.weightsmith.evaluation.v1+json"
ADAPTER_TYPE = "application/vnd.weightsmith.adapter.v1"
NUMBER = "dev.weightsmith.number"
"""Annotation of an adapter: its place in the order of merging, from 0."""
SPDX_TYPE = "application/spdx+json"
STATEMENTS = (signing.STATEMENT_TYPE, signing.ENVELOPE_TYPE)
_MOST_ATTACHED = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A file beside the image, by its kind."""

    artifact_type: str
    parts: tuple[Part, ...]
    annotations: Mapping[str, str] = field(default_factory=dict)


def titled(artifact_type: str, title: str, content: Json) -> Document:
    """Return a document of one JSON file."""
    part = Part.of_bytes(canonical(content), artifact_type, **{TITLE: title})
    return Document(artifact_type=artifact_type, parts=(part,), annotations={TITLE: title})


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """All that goes beside an image."""

    statements: tuple[Mapping[str, Json], ...] = ()
    """Those that we make and sign."""
    kept: tuple[Part, ...] = ()
    """Those of the image that this one came from."""
    documents: tuple[Document, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundStatement:
    """A statement as found."""

    statement: Mapping[str, Json]
    part: Part
    signed: bool
    """By the key that was asked for; False without a key."""


def is_ours(statement: Mapping[str, Json]) -> bool:
    """Say whether a statement is one that we make, so that our key has to vouch for it."""
    kinds = ("merge", "quantize", "split", "bake", "rebase")
    return statement.get("predicateType") == TEST_RESULT or kind_of(statement) in kinds


def read_attached(place: Place, image: Digest) -> list[Attachment]:
    """Return everything that hangs on an image; its parts are read when they are asked for."""
    return [place.read(blob, tag) for blob, tag in limited(place.attached(image))]


def signatures_in(attachments: Iterable[Attachment]) -> list[Part]:
    """Return the signed claims about image digests."""
    return [
        part
        for attachment in attachments
        for part in attachment.parts
        if part.blob.media_type == signing.SIMPLE_SIGNING
    ]


def claims_in(attachments: Sequence[Attachment], check: signing.Check | None) -> list[str]:
    """Return the image digest that each signature vouches for; empty where the key did not sign.

    Raises InputRefused for a signature that cannot be read. A bundle may be anything; those that
    hold no claim are left out.
    """
    found = [signing.signed_digest(part, check) for part in signatures_in(attachments)]
    for part in bundles_in(attachments):
        try:
            read = read_statement(part, check)
        except InputRefused:
            continue
        if is_claim(read.statement):
            found += subjects_of(read.statement).values() if read.signed else [""]
    return found


def is_claim(statement: Mapping[str, Json]) -> bool:
    """Say whether a statement is cosign 3's signature of an image, and says nothing else of it."""
    return statement.get("predicateType") == signing.SIGN_PREDICATE


def bundles_in(attachments: Iterable[Attachment]) -> list[Part]:
    """Return Sigstore's bundles, each once: statements, and cosign 3's signatures."""
    parts = (part for attachment in attachments for part in attachment.parts)
    return list({part.blob.digest: part for part in parts if is_bundle(part)}.values())


def is_bundle(part: Part) -> bool:
    """Say whether a part is a Sigstore bundle."""
    return part.blob.media_type.startswith(signing.BUNDLE_TYPE)


def read_statement(part: Part, check: signing.Check | None) -> FoundStatement:
    """Return a statement, plain, in an envelope or in a bundle; InputRefused for anything else."""
    data = signing.unbundled(part.read()) if is_bundle(part) else part.read()
    if is_bundle(part) or part.blob.media_type == signing.ENVELOPE_TYPE:
        statement, signed = signing.open_envelope(data, check)
        return FoundStatement(statement=statement, part=part, signed=signed)
    try:
        plain = parse(data, largest=PART, unique=True)
    except ValueError:
        plain = None
    if not isinstance(plain, dict):
        raise InputRefused(
            "a statement is not a JSON object", hint="the image is damaged; push or write it again"
        )
    return FoundStatement(statement=plain, part=part, signed=False)


def statement_parts(attachments: Iterable[Attachment]) -> list[Part]:
    """Return the statements, each once."""
    found = {
        part.blob.digest: part
        for attachment in attachments
        for part in attachment.parts
        if part.blob.media_type in STATEMENTS
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
            part.blob.media_type in (*STATEMENTS, signing.SIMPLE_SIGNING) or is_bundle(part)
            for part in attachment.parts
        )
    ]


def limited(rows: Sequence[tuple[Blob, str]]) -> Sequence[tuple[Blob, str]]:
    """Return the rows; InputRefused where more hangs on an image than anybody would attach."""
    if len(rows) > _MOST_ATTACHED:
        raise InputRefused(
            f"{len(rows)} manifests are attached to the image",
            hint="delete those in the registry that nobody needs",
        )
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
