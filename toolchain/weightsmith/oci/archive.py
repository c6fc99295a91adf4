"""The stream that `docker load` reads: an OCI layout and a `manifest.json` in one tar.

https://github.com/moby/docker-image-spec/blob/main/v1.2.md (combined image JSON + file system)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from weightsmith.oci import manifests, tar
from weightsmith.oci.image import Image
from weightsmith.oci.layout import MARKER, REF_NAME
from weightsmith.oci.references import Reference
from weightsmith.values import Digest, canonical

_LARGE = 64 << 20
"""From this many bytes on, receiving a layer takes longer than asking the engine once more."""


def docker_archive(
    image: Image, reference: Reference, skip_diff_ids: Sequence[str] = ()
) -> Iterator[bytes]:
    """Yield the archive in chunks of about 1 MiB; nothing is written to disk.

    `skip_diff_ids` are the layers, bottom first, of an image that the engine holds: those that
    both images start with are left out. The engine refuses the archive where it does not hold
    them after all, which for containerd's image store is where it has them compressed.
    """
    held = _held(image, skip_diff_ids)
    yield from _file("oci-layout", MARKER)
    for blob, opener in image.blobs():
        if blob.digest in held:
            continue
        yield tar.header(_place(blob.digest), size=blob.size, mode=0o644, mtime=0)
        yield from opener()
        yield tar.padding(blob.size)
    yield from _file(_place(image.digest), image.manifest_bytes)
    name = f"{reference.name}:{reference.tag or 'latest'}"
    yield from _file("index.json", _index(image, name, reference.tag or "latest"))
    row = {
        "Config": _place(image.config_blob.digest),
        "RepoTags": [name],
        "Layers": [_place(layer.digest) for layer in image.layers],
    }
    yield from _file("manifest.json", canonical([row]))
    yield tar.END


def in_turn(image: Image, held: int = 0) -> tuple[Image, ...]:
    """Return images that each add a large layer, or some small ones; the last is the image itself.

    An engine that unpacks one of them can receive the next meanwhile. `held` is how many layers
    from the bottom it holds already.
    """
    ends, size = [], 0
    for end, layer in enumerate(image.layers[held:-1], held + 1):
        size += layer.size
        if size >= _LARGE:
            ends.append(end)
            size = 0
    settings = {key: image.settings[key] for key in ("os", "architecture")}
    return (*(Image(layers=image.layers[:end], settings=settings) for end in ends), image)


def _held(image: Image, skip_diff_ids: Sequence[str]) -> set[Digest]:
    """Return the blobs that may be left out: a common start, and in no layer after it."""
    common = 0
    for layer, diff_id in zip(image.layers, skip_diff_ids, strict=False):
        if layer.diff_id != diff_id:
            break
        common += 1
    needed = {layer.digest for layer in image.layers[common:]}
    return {layer.digest for layer in image.layers[:common]} - needed


def _index(image: Image, name: str, tag: str) -> bytes:
    blob = image.manifest_blob
    row = {
        "mediaType": blob.media_type,
        "digest": blob.digest,
        "size": blob.size,
        "annotations": {"io.containerd.image.name": name, REF_NAME: tag},
    }
    return canonical({"schemaVersion": 2, "mediaType": manifests.OCI_INDEX, "manifests": [row]})


def _place(digest: Digest) -> str:
    return f"blobs/sha256/{digest.hex}"


def _file(path: str, data: bytes) -> Iterator[bytes]:
    yield tar.header(path, size=len(data), mode=0o644, mtime=0)
    yield data
    yield tar.padding(len(data))
