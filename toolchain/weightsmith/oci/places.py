"""Where an image is, with what hangs on it: a registry's reference or a layout folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from weightsmith.errors import UsageError
from weightsmith.oci import layout_attachments, manifests
from weightsmith.oci.attachments import Attachment
from weightsmith.oci.image import Image
from weightsmith.oci.layout import is_layout, locate, read_index, read_layout
from weightsmith.oci.references import Reference
from weightsmith.oci.registry import Registry
from weightsmith.values import Blob, Digest


class Place(Protocol):
    """An image and its attachments, read when they are asked for."""

    def image(self, platform: str | None = None) -> Image:
        """Return the image for a platform, this machine's by default."""

    def index(self) -> bytes | None:
        """Return the index that the place names, or None where it names an image."""

    def attached(self, subject: Digest) -> list[tuple[Blob, str]]:
        """Return the manifests attached to an image, each with its own tag or empty."""

    def read(self, blob: Blob, tag: str = "") -> Attachment:
        """Return an attachment; an error where it is not what its digest says."""

    def attach(self, *attachments: Attachment) -> None:
        """Put attachments beside their image."""


@dataclass(frozen=True, slots=True)
class RegistryPlace:
    """An image in a registry."""

    registry: Registry
    reference: Reference

    def image(self, platform: str | None = None) -> Image:
        """Return the image for a platform, this machine's by default."""
        return self.registry.pull(self.reference, platform=platform)

    def index(self) -> bytes | None:
        """Return the index that the reference names, or None where it names an image."""
        body, kind = self.registry.read_manifest(self.reference)
        return body if kind in manifests.INDEXES else None

    def attached(self, subject: Digest) -> list[tuple[Blob, str]]:
        """Return the manifests attached to an image, each with its own tag or empty."""
        return self.registry.attached(self.reference, subject)

    def read(self, blob: Blob, tag: str = "") -> Attachment:
        """Return an attachment; Altered where it is not what its digest says."""
        return self.registry.read_attachment(self.reference, blob, tag)

    def attach(self, *attachments: Attachment) -> None:
        """Put attachments beside their image."""
        self.registry.attach(self.reference, *attachments)


@dataclass(frozen=True, slots=True)
class LayoutPlace:
    """An image in an OCI layout folder: of that name, or the only one."""

    folder: Path
    name: str | None = None

    def image(self, platform: str | None = None) -> Image:
        """Return the image for a platform, this machine's by default."""
        return read_layout(self.folder, self.name, platform=platform)

    def index(self) -> bytes | None:
        """Return the index that the name stands for, or None where it is an image."""
        return read_index(self.folder, self.name)

    def attached(self, subject: Digest) -> list[tuple[Blob, str]]:
        """Return the manifests attached to an image; a layout has no tags for them."""
        return layout_attachments.attached(self.folder, subject)

    def read(self, blob: Blob, tag: str = "") -> Attachment:
        """Return an attachment; InputRefused where it is not what its digest says."""
        del tag
        return layout_attachments.read_attachment(self.folder, blob)

    def attach(self, *attachments: Attachment) -> None:
        """Put attachments beside their image."""
        for attachment in attachments:
            layout_attachments.attach(self.folder, attachment)


def open_place(source: str, registry: Registry) -> Place:
    """Return the place of a layout folder (`[oci:]DIR[:NAME]`) or of a registry reference."""
    if is_layout(source):
        return LayoutPlace(*locate(source))
    if Path(source).is_dir():
        raise UsageError(
            f"{source} is a folder, but not an OCI layout",
            hint="give the folder that `--layout` wrote, or a reference",
        )
    return RegistryPlace(registry, Reference.parse(source))
