"""Where an image and its attachments are: a registry reference or a layout folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from weightsmith.core.errors import InputRefused, UsageError
from weightsmith.core.values import Blob, Digest
from weightsmith.oci import manifests
from weightsmith.oci.attachments import Attachment
from weightsmith.oci.image import Image
from weightsmith.oci.layout import LayoutLocation, is_layout, locate, require_layout
from weightsmith.oci.references import Reference
from weightsmith.oci.registry import Registry

_HINT = "give the folder that `--layout` wrote, or an image reference"


@dataclass(frozen=True, slots=True)
class RegistryLocation:
    """An image in a registry."""

    registry: Registry
    reference: Reference
    every: bool = False
    """Whether an attachment that is listed is looked for all the same, and sent if it is gone."""

    def image(self, platform: str | None = None) -> Image:
        """Return the image for a platform (default: this one)."""
        return self.registry.pull(self.reference, platform=platform)

    def index(self) -> bytes | None:
        """Return the index of the reference, or None if it is an image."""
        body, kind = self.registry.read_manifest(self.reference)
        return body if kind in manifests.INDEXES else None

    def attached(self, subject: Digest) -> list[tuple[Blob, str]]:
        """Return the manifests attached to an image, each with its tag or an empty one.

        With `every`, only those that are really there: a registry may lose what it still lists.
        """
        listed = self.registry.attached(self.reference, subject)
        if not self.every:
            return listed
        asked, there = self.reference, self.registry.digest_of
        return [(blob, tag) for blob, tag in listed if there(asked.at(blob.digest))]

    def read(self, blob: Blob, tag: str = "") -> Attachment:
        """Return an attachment; raises Altered if it does not match its digest."""
        return self.registry.read_attachment(self.reference, blob, tag)

    def attach(self, *attachments: Attachment) -> None:
        """Store attachments with their image."""
        self.registry.attach(self.reference, *attachments, every=self.every)


ImageLocation: TypeAlias = RegistryLocation | LayoutLocation
"""An image and its attachments, read on demand."""


def open_location(source: str, registry: Registry) -> ImageLocation:
    """Return the location of a layout folder (`[oci:]DIR[:NAME]`) or a registry reference.

    Raises InputRefused for a folder that is not there or not a layout, UsageError for what is
    neither path nor reference.
    """
    if is_layout(source):
        folder, name = locate(source)
        require_layout(folder)
        return LayoutLocation(folder, name)
    if source.strip() and Path(source).is_dir():
        raise InputRefused(f"{source} is a folder, but not an OCI layout", hint=_HINT)
    return RegistryLocation(registry, reference_of(source))


def reference_of(source: str) -> Reference:
    """Return the reference of an image that is no layout.

    Raises InputRefused if the user means a path, which no registry should be asked for, UsageError
    for what is neither path nor reference.
    """
    if source.startswith((".", "/", "~")) or source.endswith("/"):
        why = "is not an OCI layout" if Path(source).exists() else "does not exist"
        raise InputRefused(f"{source} {why}", hint=_HINT)
    try:
        return Reference.parse(source)
    except UsageError as error:
        # A path has a separator, and does not begin with a registry.
        first, slash, _ = source.partition("/")
        if not slash or any(character in first for character in ".:@"):
            raise
        raise InputRefused(f"{source} does not exist, and {error.message}", hint=_HINT) from None
