"""OCI image layouts: folders, written atomically and read as untrusted input; streams for engines.

https://github.com/opencontainers/image-spec/blob/main/image-layout.md
https://github.com/moby/docker-image-spec/blob/main/v1.2.md (combined image JSON + file system)

Attachments of ours are listed in `referrers.json`, an index beside `index.json`. So a layout of one
image has one row in its index, and skopeo, podman and umoci accept it without a name. Rows of
`index.json` with a subject, as oras writes them, are read as well, and so are those of `cosign
save`. Rows of `index.json` for ours would survive `umoci gc` and `oras copy -r`, but then skopeo
and podman require an image name.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from weightsmith.core.errors import EnvironmentFailure, InputRefused, UsageError
from weightsmith.core.files import replace_file, sweep
from weightsmith.core.values import Blob, Digest, JsonValue, canonical
from weightsmith.oci import manifests, tar
from weightsmith.oci.attachments import Attachment, load_attachment, with_rows
from weightsmith.oci.image import Image, ImageOrIndex, Index, Opener, load_image
from weightsmith.oci.layers import CHUNK, Advance, Meter, checked_opener, verified
from weightsmith.oci.references import Reference

REF_NAME = "org.opencontainers.image.ref.name"
DEFAULT_NAME = "latest"
_SAVED = ("dev.cosignproject.cosign/sigs", "dev.cosignproject.cosign/atts")
MARKER = canonical({"imageLayoutVersion": "1.0.0"})
MODE = 0o644
"""Mode of a layout's files, whatever the umask."""
LIST = "referrers.json"
PARTS = frozenset({"blobs", "index.json", "oci-layout", LIST})
"""All top-level names in a layout of ours."""
_LARGE = 64 << 20
"""Bytes; receiving a layer of this size takes longer than one more request to the engine."""


@contextmanager
def _writing(folder: Path) -> Iterator[Path]:
    """Give the folder of a layout's blobs; raises EnvironmentFailure for disk errors."""
    try:
        yield folder / "blobs" / "sha256"
    except OSError as error:
        raise EnvironmentFailure(
            f"cannot write the image layout {folder}: {error.strerror or error}",
            hint="check free space and permissions, then run it again",
        ) from None


def write_layout(
    whole: ImageOrIndex, folder: Path, *, ref: str = DEFAULT_NAME, progress: Advance | None = None
) -> Digest:
    """Add an image, or an index and its images, to a layout folder as `ref`; return its digest.

    Valid blobs are kept; `index.json` is written last, so a reader never sees half an image.
    Raises InputRefused if a source has changed, EnvironmentFailure for disk errors.
    """
    if isinstance(whole, Index):
        for image in whole.images:
            write_layout(image, folder, ref=ref, progress=progress)
    with _writing(folder) as store:
        if isinstance(whole, Image):
            store.mkdir(parents=True, exist_ok=True)
            sweep(store)
            blobs = list(whole.blobs())
            meter = Meter(sum(blob.size for blob, _ in blobs), progress)
            layers = {layer.digest: layer for layer in reversed(whole.layers)}
            for blob, opener in blobs:
                layer = layers.get(blob.digest)
                put_blob(store, blob, checked_opener(layer, blob) if layer else opener, meter)
        put_blob(store, whole.manifest_blob, lambda: iter((whole.manifest_bytes,)), Meter(0))
        replace_file(folder / "oci-layout", [MARKER], MODE)
        row = manifests.described(whole.manifest_blob, {REF_NAME: ref})
        rows: list[JsonValue] = [row]
        if (folder / "index.json").exists():
            rows = [*(one for one in _rows(folder) if _name(one) not in ("", ref)), row]
        if isinstance(whole, Image):
            system, _, machine = whole.platform.partition("/")
            if system:
                row["platform"] = {"os": system, "architecture": machine}
            rows.sort(key=lambda row: (_name(row), _digest(row)))
        replace_file(folder / "index.json", [manifests.index_of(rows)], MODE)
    return whole.digest


def read_layout(folder: Path, ref: str | None = None, *, platform: str | None = None) -> Image:
    """Return the image of that name (default: the only one) for a platform (default: this one).

    Every blob is verified when it is read. Raises InputRefused for malformed content, UsageError
    if the layout does not have the image.
    """
    where = str(folder)
    images = [row for row in _rows(folder) if not is_attachment(row)]
    named = [row for row in images if ref is None or _name(row) == ref]
    names = ", ".join(sorted({_name(row) for row in images} - {""}))
    if not named:
        raise UsageError(
            f"{where} holds no image" + ("" if ref is None else f" named {ref!r}"),
            hint=f"it holds: {names[:200]}" if names else "write the layout again",
        )
    if _how_many(named) == 1:
        kinds = (*manifests.MANIFESTS, *manifests.INDEXES)
        blob = manifests.descriptor(named[0], where, kinds, manifests.LARGEST_MANIFEST)
    elif ref is None and len({_name(row) for row in named}) > 1:
        raise UsageError(f"{where} holds several images", hint=f"name one: {names}")
    else:
        blob = manifests.choose(named, platform, where)
    for _ in range(4):
        if blob.media_type not in manifests.INDEXES:
            break
        inner = manifests.read_json(read_blob(folder, blob), where)
        blob = manifests.choose(manifests.listed(inner, "manifests", where), platform, where)
    return load_image(
        read_blob(folder, blob),
        blob.media_type,
        read=lambda found: read_blob(folder, found),
        opener=lambda found: lambda: open_blob(folder, found),
        where=where,
    )


def read_all(folder: Path, ref: str | None = None) -> tuple[Image, ...]:
    """Return the images for all Linux platforms of an index, or the only image."""
    index = read_index(folder, ref)
    platforms = manifests.platforms_in(index, str(folder)) if index is not None else [None]
    return tuple(read_layout(folder, ref, platform=platform) for platform in platforms)


def locate(text: str) -> tuple[Path, str | None]:
    """Return folder and image name of `[oci:]DIR[:NAME]`, as skopeo and umoci write it."""
    whole = text.removeprefix("oci:")
    folder, colon, name = whole.rpartition(":")
    if colon and name and not (Path(whole) / "oci-layout").is_file():
        return Path(folder), name
    return Path(whole), None


def is_layout(text: str) -> bool:
    """Say whether a source is a layout: by its prefix, or because the folder is one."""
    if not text.removeprefix("oci:").strip():  # as a path, it would be the current folder
        return False
    return text.startswith("oci:") or (locate(text)[0] / "oci-layout").is_file()


def read_index(folder: Path, ref: str | None = None) -> bytes | None:
    """Return the index of that name (default: the only one), or None if it is an image.

    index.json may itself be the index, with one row per platform, as go-containerregistry writes.
    """
    rows = _rows(folder)
    named = [row for row in rows if not is_attachment(row) and ref in (None, _name(row))]
    kinds = (*manifests.MANIFESTS, *manifests.INDEXES)
    if _how_many(named) != 1:
        each = [manifests.platform_of(row.get("platform")) for row in rows if isinstance(row, dict)]
        of_platforms = len(each) == len(rows) and all(each) and len(set(map(_name, rows))) == 1
        return read_small_file(folder / "index.json") if of_platforms and named == rows else None
    blob = manifests.descriptor(named[0], str(folder), kinds, manifests.LARGEST_MANIFEST)
    return read_blob(folder, blob) if blob.media_type in manifests.INDEXES else None


def image_names(folder: Path) -> set[str]:
    """Return the names of a layout's images, including empty ones; none without a layout."""
    if not (folder / "index.json").is_file():
        return set()
    return {_name(row) for row in _rows(folder) if not is_attachment(row)}


def held_digest(folder: Path) -> Digest | None:
    """Return the digest of a layout's only image or index; None without a layout."""
    if not (folder / "index.json").is_file():
        return None
    index = read_index(folder)
    return Digest.of(index) if index is not None else read_layout(folder).digest


def put_blob(store: Path, blob: Blob, opener: Opener, meter: Meter) -> None:
    """Write a blob that the opener verifies to `blobs/sha256`, unless a valid copy is there."""
    target = store / blob.digest.hex
    if not target.is_symlink() and target.is_file() and target.stat().st_size == blob.size:
        with target.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() == blob.digest.hex:
                meter.reach(blob.digest, blob.size)
                return
    replace_file(target, meter.counted(blob.digest, opener()), MODE)


def _verified(blob: Blob, opener: Opener) -> Iterator[bytes]:
    return verified(opener(), blob, blob.digest.short)


def _rows(folder: Path) -> Sequence[JsonValue]:
    """Return the rows of a layout's index.json; raises InputRefused if it is not a layout."""
    require_layout(folder)
    return _listed(folder, "index.json")


def _listed(folder: Path, name: str) -> Sequence[JsonValue]:
    document = manifests.read_json(read_small_file(folder / name), f"{folder}/{name}")
    return manifests.listed(document, "manifests", f"{folder}/{name}")


def require_layout(folder: Path) -> None:
    """Raise InputRefused if the folder does not exist, or is not a layout."""
    if not folder.exists():
        raise InputRefused(f"{folder} does not exist", hint="give the folder that `--layout` wrote")
    if not (folder / "oci-layout").is_file():
        raise InputRefused(
            f"{folder} is not an OCI layout: it has no file 'oci-layout'",
            hint="give the folder that `--layout` wrote",
        )


def _how_many(rows: Sequence[JsonValue]) -> int:
    """Return the number of different manifests; one may have several names."""
    return len({_digest(row) for row in rows})


def is_attachment(row: JsonValue) -> bool:
    """Say whether an index's row is an attachment and not an image."""
    if not isinstance(row, dict):
        return False
    kind = row.get("artifactType", manifests.MODEL_MANIFEST)
    return kind != manifests.MODEL_MANIFEST or _is_saved_by_cosign(row)


def _is_saved_by_cosign(row: JsonValue) -> bool:
    """Say whether a row was added by `cosign save` beside the only image of its layout."""
    notes = row.get("annotations") if isinstance(row, dict) else None
    return isinstance(notes, dict) and notes.get("kind") in _SAVED


def _digest(row: JsonValue) -> str:
    return str(row.get("digest")) if isinstance(row, dict) else ""


def _name(row: JsonValue) -> str:
    notes = row.get("annotations") if isinstance(row, dict) else None
    return str(notes.get(REF_NAME, "")) if isinstance(notes, dict) else ""


def read_blob(folder: Path, blob: Blob) -> bytes:
    """Return a small blob, verified."""
    return b"".join(open_blob(folder, blob))


def open_blob(folder: Path, blob: Blob) -> Iterator[bytes]:
    """Yield a blob in chunks; raises InputRefused at the end if it does not match its digest."""
    path = folder / "blobs" / "sha256" / blob.digest.hex
    return verified(_chunks(path, blob.size), blob, str(folder))


def read_small_file(path: Path) -> bytes:
    """Return a small file of a layout; raises InputRefused for links, pipes and large files."""
    return b"".join(_chunks(path, None))


def _chunks(path: Path, size: int | None) -> Iterator[bytes]:
    """Yield a regular file; links, pipes, devices and wrong sizes are refused before reading."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise InputRefused(
            f"{path} cannot be read: {error.strerror}", hint="write the layout again"
        ) from None
    try:
        status = os.fstat(handle)
        limit = manifests.LARGEST_MANIFEST if size is None else size
        wrong = status.st_size > limit if size is None else status.st_size != size
        if not stat.S_ISREG(status.st_mode) or wrong:
            raise InputRefused(
                f"{path} is not a regular file of the expected size",
                hint="the layout is damaged; write it again",
            )
        while chunk := os.read(handle, CHUNK):
            yield chunk
    finally:
        os.close(handle)


def forget(folder: Path) -> None:
    """Remove our list of attachments from a layout."""
    (folder / LIST).unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class LayoutLocation:
    """An image in an OCI layout folder: the one of that name, or the only one."""

    folder: Path
    name: str | None = None

    def image(self, platform: str | None = None) -> Image:
        """Return the image for a platform (default: this one)."""
        return read_layout(self.folder, self.name, platform=platform)

    def index(self) -> bytes | None:
        """Return the index of that name, or None if it is an image."""
        return read_index(self.folder, self.name)

    def attached(self, subject: Digest) -> list[tuple[Blob, str]]:
        """Return the manifests attached to an image, with empty tags, which a layout has not.

        Raises InputRefused if one that is listed is gone.
        """
        folder, kinds = self.folder, (manifests.OCI_MANIFEST,)
        index, own = _rows(folder), _listed_here(folder)
        rows = [*own, *filter(is_attachment, index)]
        where, most = str(folder), manifests.LARGEST_MANIFEST
        blobs = [manifests.descriptor(row, where, kinds, most) for row in rows]
        store = folder / "blobs" / "sha256"
        if lost := sum(not os.path.lexists(store / one.digest.hex) for one in blobs[: len(own)]):
            raise InputRefused(
                f"{lost} of {len(own)} attachments in {folder / LIST} are gone; programs that know"
                " only index.json delete them, as `umoci gc` does",
                hint=f"write the layout again, or delete {LIST} to go on without what it lists",
            )
        found: dict[Digest, Blob] = {}
        for row, blob in zip(rows, blobs, strict=True):
            named = self.read(blob).subject
            if named.digest == subject or (_is_saved_by_cosign(row) and not named.size):
                found[blob.digest] = blob
        return [(blob, "") for blob in found.values()]

    def read(self, blob: Blob, tag: str = "") -> Attachment:
        """Return an attachment; raises InputRefused if it does not match its digest."""
        del tag
        data, where = read_blob(self.folder, blob), str(self.folder)
        return load_attachment(data, lambda part: lambda: open_blob(self.folder, part), where)

    def attach(self, *attachments: Attachment) -> None:
        """Store attachments with their image; their rows are written last."""
        for attachment in attachments:
            with _writing(self.folder) as store:
                for blob, opener in attachment.blobs():
                    read = partial(_verified, blob, opener)
                    put_blob(store, blob, read, Meter(blob.size))
                data = attachment.manifest_bytes
                put_blob(store, attachment.blob, lambda data=data: iter((data,)), Meter(0))  # type: ignore[misc]
                rows = with_rows(_listed_here(self.folder), [attachment])
                replace_file(self.folder / LIST, [rows], MODE)


def _listed_here(folder: Path) -> Sequence[JsonValue]:
    return _listed(folder, LIST) if (folder / LIST).exists() else []


def docker_archive(
    image: Image, reference: Reference, skip_diff_ids: Sequence[str] = ()
) -> Iterator[bytes]:
    """Yield what `docker load` reads, a layout and a `manifest.json`, in chunks of about 1 MiB.

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
