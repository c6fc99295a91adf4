"""Attaches manifests to images in registries and finds them, by the referrers API or by tags.

https://github.com/opencontainers/distribution-spec/blob/main/spec.md#listing-referrers
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from weightsmith.core.errors import EnvironmentFailure, InputRefused
from weightsmith.core.values import Blob, Digest, JsonValue
from weightsmith.oci import downloads, manifests, uploads
from weightsmith.oci.attachments import Attachment, fallback_tag, load_attachment, with_rows
from weightsmith.oci.paging import next_page
from weightsmith.oci.references import Reference
from weightsmith.oci.session import RegistrySession

_OK, _MISSING = 200, 404
_MOST_PAGES = 20
_COSIGN = (".sig", ".att")
"""Tag suffixes under which cosign keeps signatures and statements."""


def attach(
    session: RegistrySession, reference: Reference, *attachments: Attachment, every: bool = False
) -> None:
    """Push attachments into their image's repository, where every reader will find them.

    One that is listed already, or whose manifest is there, is not sent again: a registry takes a
    manifest after its blobs, and a list is written last. With `every`, each manifest is looked for.
    """
    added: dict[Digest, list[Attachment]] = {}
    knows = True
    digests = {attachment.blob.digest for attachment in attachments}
    listed = set() if every else _listed(session, reference, attachments)
    there = listed | {
        one for one in digests - listed if downloads.digest_of(session, reference.at(one))
    }
    missing = [a for a in attachments if a.blob.digest not in there]
    blobs = {blob.digest: (blob, o) for a in missing for blob, o in a.blobs()}
    for blob, opener in blobs.values():
        uploads.upload_blob(session, blob, opener)
    for attachment in attachments:
        data, digest = attachment.manifest_bytes, attachment.blob.digest
        reply = None
        if digest not in there:
            reply = uploads.put_manifest(session, digest, data, manifests.OCI_MANIFEST)
        if attachment.tag:
            target = Reference(reference.registry, reference.repository, attachment.tag)
            uploads.put_tag(session, target, data, manifests.OCI_MANIFEST, force=True)
        if _has_subject(attachment):
            knows = knows and (reply is None or "oci-subject" in reply.headers)
            added.setdefault(attachment.subject.digest, []).append(attachment)
    for subject, those in added.items():
        if all(one.blob.digest in listed for one in those):
            continue
        # Some registries send this header and still have no referrers API.
        if not knows or _by_api(session, reference, subject) is None:
            _list(session, reference, subject, those)


def _listed(
    session: RegistrySession, reference: Reference, attachments: Sequence[Attachment]
) -> set[Digest]:
    """Return which attachments their images' lists have; none of a list that cannot be read."""
    found: set[str] = set()
    for subject in {one.subject.digest for one in attachments if _has_subject(one)}:
        # Some registries without the API fail when they are asked for it.
        with suppress(EnvironmentFailure):
            rows = _by_api(session, reference, subject)
            if rows is None:
                rows = _by_tag(session, reference, fallback_tag(subject)) or []
            found |= {str(row.get("digest")) for row in rows if isinstance(row, dict)}
    return {one.blob.digest for one in attachments if one.blob.digest in found}


def _has_subject(attachment: Attachment) -> bool:
    """Return whether its manifest names the image, as cosign's own do not."""
    return attachment.raw is None or b'"subject"' in attachment.raw


def _list(
    session: RegistrySession, reference: Reference, subject: Digest, those: list[Attachment]
) -> None:
    """Add attachments to the fallback tag, if the registry has no referrers API."""
    tag = fallback_tag(subject)
    rows = _by_tag(session, reference, tag)
    if rows is None:
        # The fallback tag is taken, and we must not overwrite it.
        raise InputRefused(
            f"{reference.registry}/{reference.repository}:{tag} is an image, not a referrers list",
            hint="`cosign copy` leaves such a tag: delete it in the registry",
        )
    index = with_rows(rows, those)
    if index != with_rows(rows, ()):
        uploads.put_manifest(session, tag, index, manifests.OCI_INDEX)


def find(
    session: RegistrySession, reference: Reference, subject: Digest, *, tagged: bool = True
) -> list[tuple[Blob, str]]:
    """Return the manifests attached to an image, each with its tag or an empty one.

    Without `tagged`, cosign's tags are not requested.
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
        target = Reference(reference.registry, reference.repository, tag)
        digest = downloads.digest_of(session, target)
        if digest:
            blob = found[digest][0] if digest in found else Blob(
                digest=digest, size=0, media_type=manifests.OCI_MANIFEST
            )  # fmt: skip
            found[digest] = (blob, tag)
    return list(found.values())


def read(session: RegistrySession, reference: Reference, blob: Blob, tag: str = "") -> Attachment:
    """Return an attachment; raises Altered if it does not match its digest."""
    target = reference.at(blob.digest)
    data, _ = downloads.manifest(session, target)
    return load_attachment(
        data, lambda part: lambda: downloads.blob(session, part), str(target), tag
    )


def _by_api(
    session: RegistrySession, reference: Reference, subject: Digest
) -> list[JsonValue] | None:
    """Return the API's list, or None if the registry has no referrers API."""
    url = f"referrers/{subject}"
    rows: list[JsonValue] = []
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
            return None  # some proxies answer unknown paths with a web page
        url = next_page(session, reply)
        if not url:
            break
    return rows


def _by_tag(session: RegistrySession, reference: Reference, tag: str) -> list[JsonValue] | None:
    """Return the list under a tag, or None if the tag is an image: `cosign copy` leaves such."""
    target = Reference(reference.registry, reference.repository, tag)
    found = downloads.manifest_or_none(session, target)
    if found is None:
        return []
    body, kind = found
    if kind not in manifests.INDEXES or fallback_tag(Digest.of(body)) == tag:
        return None
    return manifests.listed(manifests.read_json(body, str(target)), "manifests", str(target))
