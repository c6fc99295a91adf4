"""Image indexes: one image per platform under one name; all share the weight layers.

https://github.com/opencontainers/image-spec/blob/main/image-index.md
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

from weightsmith.core.platforms import host_platform
from weightsmith.core.values import Blob, Digest, JsonValue, canonical
from weightsmith.oci import manifests
from weightsmith.oci.image import Image


@dataclass(frozen=True, kw_only=True)
class Index:
    """Images by platform; the digest is known once every image's is."""

    images: tuple[Image, ...]

    @cached_property
    def manifest_bytes(self) -> bytes:
        """The index document, platforms sorted."""
        rows = sorted(map(_row, self.images), key=lambda row: canonical(row["platform"]))
        return manifests.index_of(rows)

    @property
    def digest(self) -> Digest:
        """The index's digest."""
        return Digest.of(self.manifest_bytes)

    @property
    def blob(self) -> Blob:
        """The index's descriptor."""
        size = len(self.manifest_bytes)
        return Blob(digest=self.digest, size=size, media_type=manifests.OCI_INDEX)

    @property
    def host_image(self) -> Image:
        """The image for this machine's platform, else the first."""
        return next((i for i in self.images if is_for_host(i)), self.images[0])


ImageOrIndex: TypeAlias = Image | Index
"""What a name resolves to: an image, or an index of one image per platform."""


def index_of(images: Sequence[Image]) -> ImageOrIndex:
    """Return a single image as it is, several as an index."""
    return images[0] if len(images) == 1 else Index(images=tuple(images))


def images_of(whole: ImageOrIndex) -> tuple[Image, ...]:
    """Return the image itself, or all images of an index."""
    return whole.images if isinstance(whole, Index) else (whole,)


def host_image(whole: ImageOrIndex) -> Image:
    """Return the image itself, or an index's image for this machine."""
    return whole.host_image if isinstance(whole, Index) else whole


def is_for_host(image: Image) -> bool:
    """Say whether an image is for this machine's platform."""
    return image.platform == host_platform()


def _row(image: Image) -> dict[str, JsonValue]:
    system, _, machine = image.platform.partition("/")
    platform: Mapping[str, JsonValue] = {"os": system, "architecture": machine}
    variant = image.settings.get("variant")
    return {
        **manifests.described(image.manifest_blob),
        "platform": {**platform, **({"variant": variant} if variant else {})},
    }
