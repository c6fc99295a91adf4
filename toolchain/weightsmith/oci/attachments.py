"""Attachments of an image: manifests with a subject, such as statements, reports and signatures.

https://github.com/opencontainers/image-spec/blob/main/manifest.md#guidelines-for-artifact-usage
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from weightsmith.core.safe_parse import PART
from weightsmith.core.values import Blob, Digest, JsonValue, canonical
from weightsmith.models.reshard import read_file
from weightsmith.oci import manifests
from weightsmith.oci.image import Opener
from weightsmith.oci.layers import TITLE

EMPTY_TYPE = "application/vnd.oci.empty.v1+json"
EMPTY = b"{}"
BINARY = "application/octet-stream"
LARGEST_PART = PART
"""Bytes of a part that is read into memory: a statement, a report, a bill of materials."""
_MOST_PARTS = 10_000
_NONE = Blob(digest=Digest.of(b""), size=0, media_type="")


@dataclass(frozen=True, slots=True, kw_only=True)
class AttachmentPart:
    """One blob of an attachment."""

    blob: Blob
    open: Opener
    annotations: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of_bytes(cls, data: bytes, media_type: str, **annotations: str) -> AttachmentPart:
        """Return a part whose content is in memory."""
        blob = Blob(digest=Digest.of(data), size=len(data), media_type=media_type)
        return cls(blob=blob, open=lambda: iter((data,)), annotations=annotations)

    @classmethod
    def of_file(cls, path: Path, title: str, digest: Digest) -> AttachmentPart:
        """Return a part that is read from a file with a known digest."""
        size = path.stat().st_size
        blob = Blob(digest=digest, size=size, media_type=BINARY)
        return cls(blob=blob, open=lambda: read_file(path, size), annotations={TITLE: title})

    @property
    def title(self) -> str:
        """Its file name, or empty."""
        return self.annotations.get(TITLE, "")

    def read(self) -> bytes:
        """Return the content; raises InputRefused if it is too large for memory."""
        if self.blob.size > LARGEST_PART:
            raise manifests.damaged(
                f"{self.title or self.blob.digest} is too large to read: {self.blob.size} bytes"
            )
        return b"".join(self.open())


@dataclass(frozen=True, kw_only=True)
class Attachment:
    """A manifest about an image; it is copied with the image and keeps its digest."""

    artifact_type: str
    subject: Blob = _NONE
    """What it is about; nothing for one that is not attached yet."""
    parts: tuple[AttachmentPart, ...]
    annotations: Mapping[str, str] = field(default_factory=dict)
    config: bytes = EMPTY
    config_type: str = EMPTY_TYPE
    tag: str = ""
    """A tag in addition to the digest, for readers that look for one, such as cosign."""
    raw: bytes | None = None
    """The manifest as it was read, so that its digest stays the same."""

    @cached_property
    def manifest_bytes(self) -> bytes:
        """The manifest."""
        if self.raw is not None:
            return self.raw
        document: dict[str, JsonValue] = {
            "schemaVersion": 2,
            "mediaType": manifests.OCI_MANIFEST,
            "artifactType": self.artifact_type,
            "config": manifests.described(self._config_blob),
            "layers": [manifests.described(part.blob, part.annotations) for part in self.parts],
            "subject": manifests.described(self.subject),
        }
        if self.annotations:
            document["annotations"] = dict(self.annotations)
        return canonical(document)

    @property
    def blob(self) -> Blob:
        """The manifest's descriptor."""
        data = self.manifest_bytes
        return Blob(digest=Digest.of(data), size=len(data), media_type=manifests.OCI_MANIFEST)

    @property
    def row(self) -> Mapping[str, JsonValue]:
        """Its entry in a referrers index."""
        row = manifests.described(self.blob, self.annotations)
        return {**row, "artifactType": self.artifact_type}

    @property
    def _config_blob(self) -> Blob:
        return Blob(
            digest=Digest.of(self.config), size=len(self.config), media_type=self.config_type
        )

    def blobs(self) -> Iterator[tuple[Blob, Opener]]:
        """Yield every blob below the manifest."""
        yield self._config_blob, lambda: iter((self.config,))
        for part in self.parts:
            yield part.blob, part.open

    def about(self, subject: Blob) -> Attachment:
        """Return the same content, attached to another image."""
        return replace(self, subject=subject, raw=None, tag="")


def load_attachment(
    manifest: bytes,
    opener: Callable[[Blob], Opener],
    where: str,
    tag: str = "",
    *,
    whole: bool = True,
) -> Attachment:
    """Return the attachment that a manifest describes; raises InputRefused if it is malformed.

    Not `whole`, its configuration is left out.
    """
    document = manifests.read_json(manifest, where)
    rows = manifests.listed(document, "layers", where)
    if len(rows) > _MOST_PARTS:
        raise manifests.damaged(f"{where} has too many parts: {len(rows)}")
    config = _blob(document.get("config"), where)
    subject = document.get("subject")
    found = Attachment(
        artifact_type=str(document.get("artifactType") or config.media_type),
        subject=_blob(subject, where) if subject else _NONE,
        parts=tuple(
            AttachmentPart(blob=blob, open=opener(blob), annotations=_texts(row.get("annotations")))
            for row in rows
            for blob in [_blob(row, where)]
        ),
        annotations=_texts(document.get("annotations")),
        config_type=config.media_type,
        raw=manifest,
        tag=tag,
    )
    if config.digest == Digest.of(EMPTY) or not whole:
        return found
    if config.size > manifests.LARGEST_CONFIG:
        raise manifests.damaged(f"{where} declares a configuration of {config.size} bytes")
    return replace(found, config=b"".join(opener(config)()))


def fallback_tag(subject: Digest, suffix: str = "") -> str:
    """Return the tag that holds the referrers list in registries without the referrers API.

    https://github.com/opencontainers/distribution-spec/blob/main/spec.md#referrers-tag-schema
    """
    return f"sha256-{subject.hex}{suffix}"


def with_rows(rows: Sequence[JsonValue], attachments: Sequence[Attachment]) -> bytes:
    """Return a referrers index with the attachments added, each once."""
    new = {str(attachment.blob.digest): attachment.row for attachment in attachments}
    old = {str(row.get("digest")): row for row in rows if isinstance(row, dict)}
    return manifests.index_of([row for _, row in sorted({**old, **new}.items())])


def _blob(row: JsonValue, where: str) -> Blob:
    media_type = str(row.get("mediaType")) if isinstance(row, dict) else ""
    return manifests.descriptor(row, where, (media_type,))


def _texts(value: JsonValue) -> dict[str, str]:
    pairs = value.items() if isinstance(value, dict) else ()
    return {key: text for key, text in pairs if isinstance(text, str)}
