"""Attaches things to images in registries and finds them: by the referrers API or by tags.

https://github.com/opencontainers/distribution-spec/blob/main/spec.md#listing-referrers
"""

from __future__ import annotations

import re

from weightsmith.errors import InputRefused
from weightsmith.oci import downloads, manifests, uploads
from weightsmith.oci.attachments import Attachment, fallback_tag, load_attachment, with_rows
from weightsmith.oci.references import Reference
from weightsmith.oci.replies import Reply
from weightsmith.oci.session import RegistrySession
from weightsmith.values import Blob, Digest, Json

_OK, _MISSING = 200, 404
_MOST_PAGES = 20
_COSIGN = (".sig", ".att")
"""Suffixes of the tags that cosign keeps its signatures and statements under."""


def attach(session: RegistrySession, reference: Reference, *attachments: Attachment) -> None:
    """Put attachments beside their image, where every reader will find them."""
    added: dict[Digest, list[Attachment]] = {}
    knows = True
    blobs = {blob.digest: (blob, o) for a in attachments for blob, o in a.blobs()}
    for blob, opener in blobs.values():
        uploads.bring(session, blob, opener)
    for attachment in attachments:
        data = attachment.manifest_bytes
        reply = uploads.put_manifest(session, attachment.blob.digest, data, manifests.OCI_MANIFEST)
        if attachment.tag:
            place = Reference(reference.registry, reference.repository, attachment.tag)
            uploads.put_tag(session, place, data, manifests.OCI_MANIFEST, force=True)
        if attachment.raw is None or b'"subject"' in attachment.raw:
            knows = knows and "oci-subject" in reply.headers
            added.setdefault(attachment.subject.digest, []).append(attachment)
    for subject, those in added.items():
        # Some say with the header that they know referrers, and have no list to ask for.
        if not knows or _by_api(session, reference, subject) is None:
            _list(session, reference, subject, those)


def _list(
    session: RegistrySession, reference: Reference, subject: Digest, those: list[Attachment]
) -> None:
    """Keep the list of what hangs on an image under a tag, where the registry keeps none."""
    tag = fallback_tag(subject)
    rows = _by_tag(session, reference, tag)
    if rows is None:
        # Only where the registry keeps no list itself, and then nobody may write over it.
        raise InputRefused(
            f"{reference.registry}/{reference.repository}:{tag} is an image, and no list of what "
            "is attached to one",
            hint="`cosign copy` leaves such a tag: delete it in the registry",
        )
    index = with_rows(rows, those)
    if index != with_rows(rows, ()):
        uploads.put_manifest(session, tag, index, manifests.OCI_INDEX)


def find(
    session: RegistrySession, reference: Reference, subject: Digest, *, tagged: bool = True
) -> list[tuple[Blob, str]]:
    """Return the manifests attached to an image, each with the tag it has, if it has one.

    Without `tagged`, cosign's tags are not asked for.
    """
    rows = _by_api(session, reference, subject)
    if rows is None:
        rows = _by_tag(session, reference, fallback_tag(subject)) or []
    kinds = (manifests.OCI_MANIFEST,)
    found = {
        blob.digest: (blob, "")
        for row in rows
        if isinstance(row, dict) and row.get("mediaType") in kinds
        for blob in [manifests.descriptor(row, str(reference), kinds, manifests.LARGEST_MANIFEST)]
    }
    for suffix in _COSIGN if tagged else ():
        tag = fallback_tag(subject, suffix)
        place = Reference(reference.registry, reference.repository, tag)
        digest = downloads.digest_of(session, place)
        if digest:
            blob = found[digest][0] if digest in found else Blob(
                digest=digest, size=0, media_type=manifests.OCI_MANIFEST
            )  # fmt: skip
            found[digest] = (blob, tag)
    return list(found.values())


def read(session: RegistrySession, reference: Reference, blob: Blob, tag: str = "") -> Attachment:
    """Return an attachment; Altered where it is not what its digest says."""
    place = reference.at(blob.digest)
    data, _ = downloads.manifest(session, place)
    return load_attachment(
        data, lambda part: lambda: downloads.blob(session, part), str(place), tag
    )


def _by_api(session: RegistrySession, reference: Reference, subject: Digest) -> list[Json] | None:
    """Return the API's list, or None where the registry has no such API."""
    url = f"referrers/{subject}"
    rows: list[Json] = []
    for _ in range(_MOST_PAGES):
        reply = session.attempt(
            f"cannot list what is attached to {reference}",
            lambda url=url: session.call("GET", url, limit=manifests.LARGEST_MANIFEST),  # type: ignore[misc]
        )
        if reply.status != _OK:
            return rows or None
        try:
            document = manifests.read_json(reply.body, str(reference))
            rows += manifests.listed(document, "manifests", str(reference))
        except InputRefused:
            return None  # some proxies answer a page for paths that they do not know
        url = _next_page(session, reply)
        if not url:
            break
    return rows


def _next_page(session: RegistrySession, reply: Reply) -> str:
    """Return the next page's address (RFC 8288), or empty."""
    # Possessive: "<" a hundred thousand times would be searched for minutes.
    found = re.search(r'<([^<>]++)>\s*+;\s*+rel="?next"?', reply.headers.get("link", ""))
    return session.follow(reply.url, found[1]) if found else ""


def _by_tag(session: RegistrySession, reference: Reference, tag: str) -> list[Json] | None:
    """Return the list under a tag, or None where it is the image: `cosign copy` leaves it there."""
    place = Reference(reference.registry, reference.repository, tag)
    found = downloads.manifest_or_none(session, place)
    if found is None:
        return []
    body, kind = found
    if kind not in manifests.INDEXES or fallback_tag(Digest.of(body)) == tag:
        return None
    return manifests.listed(manifests.read_json(body, str(place)), "manifests", str(place))
