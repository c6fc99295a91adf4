"""The stream that `docker load` reads: an OCI layout and a `manifest.json` in one tar.

https://github.com/moby/docker-image-spec/blob/main/v1.2.md (combined image JSON + file system)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from weightsmith.core.values import Digest, canonical
from weightsmith.oci import manifests, tar
from weightsmith.oci.image import Image
from weightsmith.oci.layout import MARKER, REF_NAME
from weightsmith.oci.references import Reference

_LARGE = 64 << 20
"""Bytes; receiving a layer of this size takes longer than one more request to the engine."""


def docker_archive(
    image: Image, reference: Reference, skip_diff_ids: Sequence[str] = ()
) -> Iterator[bytes]:
    """Yield the archive in chunks of about 1 MiB; nothing is written to disk.

    `skip_diff_ids` are the layers, bottom first, of an image that the engine has. The layers that
    both images start with are left out. The engine refuses the archive if it does not have them
    after all; containerd's image store does so if it keeps them compressed.
    """
    common = 0
    for layer, diff_id in zip(image.layers, skip_diff_ids, strict=False):
        if layer.diff_id != diff_id:
            break
        common += 1
    needed = {layer.digest for layer in image.layers[common:]}
    held = {layer.digest for layer in image.layers[:common]} - needed
    yield from _file("oci-layout", MARKER)
    for blob, opener in image.blobs():
        if blob.digest in held:
            continue
        yield tar.header(_blob_path(blob.digest), size=blob.size, mode=0o644, mtime=0)
        yield from opener()
        yield tar.padding(blob.size)
    yield from _file(_blob_path(image.digest), image.manifest_bytes)
    tag = reference.tag or "latest"
    name = f"{reference.name}:{tag}"
    names = {"io.containerd.image.name": name, REF_NAME: tag}
    index = manifests.index_of([manifests.described(image.manifest_blob, names)])
    yield from _file("index.json", index)
    row = {
        "Config": _blob_path(image.config_blob.digest),
        "RepoTags": [name],
        "Layers": [_blob_path(layer.digest) for layer in image.layers],
    }
    yield from _file("manifest.json", canonical([row]))
    yield tar.END


def incremental_images(image: Image, held: int = 0) -> tuple[Image, ...]:
    """Return images that each add one large layer or a few small ones; the last is `image` itself.

    So the engine can unpack one while it receives the next. `held` is the number of bottom layers
    that it already has.
    """
    ends, size = [], 0
    for end, layer in enumerate(image.layers[held:-1], held + 1):
        size += layer.size
        if size >= _LARGE:
            ends.append(end)
            size = 0
    settings = {key: image.settings[key] for key in ("os", "architecture")}
    return (*(Image(layers=image.layers[:end], settings=settings) for end in ends), image)


def _blob_path(digest: Digest) -> str:
    return f"blobs/sha256/{digest.hex}"


def _file(path: str, data: bytes) -> Iterator[bytes]:
    yield tar.header(path, size=len(data), mode=0o644, mtime=0)
    yield data
    yield tar.padding(len(data))
