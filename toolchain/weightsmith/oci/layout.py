"""OCI image layout folders: written atomically, read as untrusted input.

https://github.com/opencontainers/image-spec/blob/main/image-layout.md
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from weightsmith.core.errors import EnvironmentFailure, InputRefused, UsageError
from weightsmith.core.files import replace_file, sweep
from weightsmith.core.values import Blob, Digest, Json, JsonValue, canonical
from weightsmith.oci import manifests
from weightsmith.oci.image import Image, Opener, load_image
from weightsmith.oci.index import Index
from weightsmith.oci.layers import CHUNK, verified
from weightsmith.oci.progress import Advance, Meter

REF_NAME = "org.opencontainers.image.ref.name"
DEFAULT_NAME = "latest"
_SAVED = ("dev.cosignproject.cosign/sigs", "dev.cosignproject.cosign/atts")
MARKER = canonical({"imageLayoutVersion": "1.0.0"})
MODE = 0o644
"""Mode of a layout's files, whatever the umask."""


def write_layout(
    image: Image, folder: Path, *, ref: str = DEFAULT_NAME, progress: Advance | None = None
) -> Digest:
    """Add the image to a layout folder under the name `ref`, and return its digest.

    Valid blobs are kept; `index.json` is written last, so a reader never sees half an image.
    Raises InputRefused if a source has changed, EnvironmentFailure for disk errors.
    """
    try:
        store = folder / "blobs" / "sha256"
        store.mkdir(parents=True, exist_ok=True)
        sweep(store)
        blobs = list(image.blobs())
        meter = Meter(sum(blob.size for blob, _ in blobs), progress)
        for blob, opener in blobs:
            put_blob(store, blob, opener, meter)
        put_blob(store, image.manifest_blob, lambda: iter((image.manifest_bytes,)), Meter(0))
        replace_file(folder / "oci-layout", [MARKER], MODE)
        replace_file(folder / "index.json", [_index(image, ref, folder)], MODE)
    except OSError as error:
        raise EnvironmentFailure(
            f"cannot write the image layout {folder}: {error.strerror or error}",
            hint="check free space and permissions, then run it again",
        ) from None
    return image.digest


def write_index(
    index: Index, folder: Path, *, ref: str = DEFAULT_NAME, progress: Advance | None = None
) -> Digest:
    """Add an index and all its images to a layout folder under the name `ref`."""
    for image in index.images:
        write_layout(image, folder, ref=ref, progress=progress)
    data = index.manifest_bytes
    try:
        store = folder / "blobs" / "sha256"
        put_blob(store, index.blob, lambda: iter((data,)), Meter(0))
        rows = manifests.listed(index_document(folder), "manifests", f"{folder}/index.json")
        kept = [row for row in rows if _name(row) != ref]
        document = manifests.index_of([*kept, manifests.described(index.blob, {REF_NAME: ref})])
        replace_file(folder / "index.json", [document], MODE)
    except OSError as error:
        raise EnvironmentFailure(
            f"cannot write the image layout {folder}: {error.strerror or error}",
            hint="check free space and permissions, then run it again",
        ) from None
    return index.digest


def read_layout(folder: Path, ref: str | None = None, *, platform: str | None = None) -> Image:
    """Return the image of that name (default: the only one) for a platform (default: this one).

    Every blob is verified when it is read. Raises InputRefused for malformed content, UsageError
    if the layout does not have the image.
    """
    rows = manifests.listed(index_document(folder), "manifests", f"{folder}/index.json")
    blob = _pick(rows, ref, platform, str(folder))
    for _ in range(4):
        if blob.media_type not in manifests.INDEXES:
            break
        inner = manifests.read_json(read_blob(folder, blob), str(folder))
        blob = manifests.choose(
            manifests.listed(inner, "manifests", str(folder)), platform, str(folder)
        )
    return load_image(
        read_blob(folder, blob),
        blob.media_type,
        read=lambda found: read_blob(folder, found),
        opener=lambda found: lambda: open_blob(folder, found),
        where=str(folder),
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
    if colon and name and not _has_marker(Path(whole)):
        return Path(folder), name
    return Path(whole), None


def _has_marker(folder: Path) -> bool:
    return (folder / "oci-layout").is_file()


def is_layout(text: str) -> bool:
    """Say whether a source is a layout: by its prefix, or because the folder is one."""
    if not text.removeprefix("oci:").strip():  # as a path, it would be the current folder
        return False
    return text.startswith("oci:") or _has_marker(locate(text)[0])


def read_index(folder: Path, ref: str | None = None) -> bytes | None:
    """Return the index of that name (default: the only one), or None if it is an image.

    index.json may itself be the index, with one row per platform, as go-containerregistry writes.
    """
    rows = manifests.listed(index_document(folder), "manifests", f"{folder}/index.json")
    named = [row for row in rows if not is_attachment(row) and ref in (None, _name(row))]
    kinds = (*manifests.MANIFESTS, *manifests.INDEXES)
    if _how_many(named) != 1:
        whole = _are_platforms(rows) and named == rows
        return read_small_file(folder / "index.json") if whole else None
    blob = manifests.descriptor(named[0], str(folder), kinds, manifests.LARGEST_MANIFEST)
    return read_blob(folder, blob) if blob.media_type in manifests.INDEXES else None


def image_names(folder: Path) -> set[str]:
    """Return the names of a layout's images, including empty ones; none without a layout."""
    if not (folder / "index.json").is_file():
        return set()
    rows = manifests.listed(index_document(folder), "manifests", f"{folder}/index.json")
    return {_name(row) for row in rows if not is_attachment(row)}


def held_digest(folder: Path) -> Digest | None:
    """Return the digest of a layout's only image or index; None without a layout."""
    if not (folder / "index.json").is_file():
        return None
    index = read_index(folder)
    return Digest.of(index) if index is not None else read_layout(folder).digest


def put_blob(store: Path, blob: Blob, opener: Opener, meter: Meter) -> None:
    """Write a blob to `blobs/sha256`, unless a valid copy is there."""
    target = store / blob.digest.hex
    if _is_right(target, blob):
        meter.reach(blob.digest, blob.size)
        return
    chunks = meter.counted(blob.digest, verified(opener(), blob, target.name))
    replace_file(target, chunks, MODE)


def _is_right(path: Path, blob: Blob) -> bool:
    if path.is_symlink() or not path.is_file() or path.stat().st_size != blob.size:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == blob.digest.hex


def _index(image: Image, ref: str, folder: Path) -> bytes:
    """Return the folder's index with the image added; other names stay."""
    kept: list[Json] = []
    if (folder / "index.json").exists():
        rows = manifests.listed(index_document(folder), "manifests", f"{folder}/index.json")
        kept = [row for row in rows if _name(row) not in ("", ref)]
    row: dict[str, Json] = manifests.described(image.manifest_blob, {REF_NAME: ref})
    system, _, machine = image.platform.partition("/")
    if system:
        row["platform"] = {"os": system, "architecture": machine}
    return manifests.index_of(sorted([*kept, row], key=lambda row: (_name(row), _digest(row))))


def index_document(folder: Path) -> Mapping[str, JsonValue]:
    """Return a layout's index.json; raises InputRefused if the folder is not a layout."""
    require_layout(folder)
    return manifests.read_json(read_small_file(folder / "index.json"), f"{folder}/index.json")


def require_layout(folder: Path) -> None:
    """Raise InputRefused if the folder does not exist, or is not a layout."""
    if not folder.exists():
        raise InputRefused(f"{folder} does not exist", hint="give the folder that `--layout` wrote")
    if not (folder / "oci-layout").is_file():
        raise InputRefused(
            f"{folder} is not an OCI layout: it has no file 'oci-layout'",
            hint="give the folder that `--layout` wrote",
        )


def _pick(rows: Sequence[JsonValue], ref: str | None, platform: str | None, where: str) -> Blob:
    images = [row for row in rows if not is_attachment(row)]
    named = [row for row in images if ref is None or _name(row) == ref]
    if not named:
        names = sorted({_name(row) for row in images} - {""})
        raise UsageError(
            f"{where} holds no image" + ("" if ref is None else f" named {ref!r}"),
            hint=f"it holds: {', '.join(names)[:200]}" if names else "write the layout again",
        )
    if _how_many(named) == 1:
        return manifests.descriptor(
            named[0], where, (*manifests.MANIFESTS, *manifests.INDEXES), manifests.LARGEST_MANIFEST
        )
    if ref is None and len({_name(row) for row in named}) > 1:
        names = sorted({_name(row) for row in named} - {""})
        raise UsageError(f"{where} holds several images", hint=f"name one: {', '.join(names)}")
    return manifests.choose(named, platform, where)


def _how_many(rows: Sequence[JsonValue]) -> int:
    """Return the number of different manifests; one may have several names."""
    return len({_digest(row) for row in rows})


def _are_platforms(rows: Sequence[JsonValue]) -> bool:
    """Say whether the rows are one image for several platforms."""
    for_platforms = [
        row for row in rows if isinstance(row, dict) and manifests.platform_of(row.get("platform"))
    ]
    return len(for_platforms) == len(rows) and len({_name(row) for row in rows}) == 1


def is_attachment(row: JsonValue) -> bool:
    """Say whether an index's row is an attachment and not an image."""
    if not isinstance(row, dict):
        return False
    kind = row.get("artifactType", manifests.MODEL_MANIFEST)
    return kind != manifests.MODEL_MANIFEST or is_saved_by_cosign(row)


def is_saved_by_cosign(row: JsonValue) -> bool:
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


def has_blob(folder: Path, blob: Blob) -> bool:
    """Say whether a layout has a blob, without reading it."""
    return os.path.lexists(folder / "blobs" / "sha256" / blob.digest.hex)


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
