"""Reads layers as tar archives, with any compression, and finds files that would hide others.

zstd is read with the system's own library, which nearly every Linux has:
https://facebook.github.io/zstd/zstd_manual.html (streaming decompression)
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import tarfile
import zlib
from collections import deque
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import cache
from typing import IO, cast

from weightsmith.core.errors import InputRefused
from weightsmith.core.values import Blob
from weightsmith.oci import manifests
from weightsmith.oci.image import Image
from weightsmith.oci.layers import LAYER_TAR, BlobLayer, Layer, Memo
from weightsmith.oci.manifests import hostile

_EXTENDED = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
_LARGEST_EXTENDED = 1 << 20
_MOST_EXTENDED = 16
"""Consecutive extended headers before one file; tools write at most one of each kind."""
_LEAST_ROOM, _MOST_RATIO = 256 << 20, 200
"""Bytes that any layer may unpack to, and the multiple of its size; layers of zeros reach 1000."""
_BUFFER = 1 << 20
_LIBRARY = "libzstd.so.1"
_Buffer = ctypes.c_size_t * 3
"""ZSTD_inBuffer and ZSTD_outBuffer: an address, a size, and how far it was used."""


@contextmanager
def opened(layer: Layer) -> Iterator[tuple[tarfile.TarFile, ChunkFile]]:
    """Open a layer's tar for sequential reading, with the stream that it comes from.

    Raises InputRefused for a layer that cannot be read. Data altered in transit is not the image's
    fault, so the digest is verified before a layer is refused.
    """
    chunks = layer.open()
    stream = ChunkFile(uncompressed(layer, chunks))
    try:
        with tarfile.open(
            fileobj=cast("IO[bytes]", stream), mode="r|", bufsize=_BUFFER, tarinfo=TarEntry
        ) as archive:
            yield archive, stream
        stream.drain()
    except InputRefused:
        deque(chunks, 0)  # to the end, where the digest is verified
        raise
    except (tarfile.TarError, zlib.error, ValueError, EOFError) as error:
        deque(chunks, 0)
        raise InputRefused(
            f"the layer {layer.digest.short} cannot be unpacked: {str(error)[:200]}",
            hint="the image is damaged; pull or build it again",
        ) from None


def as_tar(layer: Layer) -> Layer:
    """Return a layer of a ModelPack that is an archive as an image's."""
    if layer.media_type not in manifests.MODEL_LAYERS:
        return layer
    kind = LAYER_TAR + layer.media_type.partition(".tar")[2]
    blob = Blob(digest=layer.digest, size=layer.size, media_type=kind)
    return BlobLayer(blob=blob, diff_id=layer.diff_id, opener=layer.open)


def entries(layer: Layer) -> Iterator[tarfile.TarInfo]:
    """Yield a layer's entries without their content; InputRefused for a damaged layer."""
    with opened(layer) as (archive, _):
        while (entry := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # they would accumulate
            yield entry


class TarEntry(tarfile.TarInfo):
    """A tar entry with limits: `tarfile` reads extended headers whole, and recursively.

    Extended headers are limited in size and number. Sparse files are refused: no tool writes them
    into layers, and half a kilobyte can declare terabytes. Raises InputRefused.
    """

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in _EXTENDED:
            chained = getattr(archive, "chained", 0) + 1
            if self.size > _LARGEST_EXTENDED or chained > _MOST_EXTENDED:
                raise hostile(
                    f"a layer has extended headers of {self.size} bytes, {chained} in a row"
                )
            archive.chained = chained  # type: ignore[attr-defined]
        found: tarfile.TarInfo = super()._proc_member(archive)  # type: ignore[misc]
        archive.chained = 0  # type: ignore[attr-defined]
        if found.issparse():
            raise hostile(f"a layer has a sparse file, {found.name[:100]!r}")
        if found.size < 0:
            raise hostile(f"a layer has a file of {found.size} bytes, {found.name[:100]!r}")
        return found


class ChunkFile:
    """Chunks as a file that can only be read forward and is hashed as it is read."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._held = b""
        self._state = hashlib.sha256()

    def read(self, size: int) -> bytes:
        """Return up to `size` bytes, fewer only at the end."""
        pieces = [self._held]
        have = len(self._held)
        while have < size and (chunk := next(self._chunks, None)) is not None:
            self._state.update(chunk)
            pieces.append(chunk)
            have += len(chunk)
        data = b"".join(pieces)
        self._held = data[size:]
        return data[:size]

    def drain(self) -> None:
        """Read what follows the archive's end: it is part of the digest."""
        for chunk in self._chunks:
            self._state.update(chunk)

    @property
    def digest(self) -> str:
        """The digest of all bytes so far."""
        return f"sha256:{self._state.hexdigest()}"


def uncompressed(layer: Layer, chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Yield a layer's uncompressed tar.

    Raises InputRefused if it cannot be decompressed, or grows far beyond its compressed size.
    """
    if layer.media_type in (LAYER_TAR, manifests.DOCKER_TAR):
        return chunks
    if layer.media_type == manifests.LAYER_ZSTD:
        if not can_read_zstd():
            raise InputRefused(
                f"the layer {layer.digest.short} is compressed with zstd, which this machine cannot"
                " read",
                hint="install libzstd (the package libzstd1, libzstd or zstd-libs), or use an image"
                " with gzip layers",
            )
        return _bounded(_unzstd(chunks), layer)
    return _bounded(_gunzip(chunks), layer)


def _bounded(pieces: Iterator[bytes], layer: Layer) -> Iterator[bytes]:
    most, size = max(_LEAST_ROOM, _MOST_RATIO * layer.size), 0
    for piece in pieces:
        size += len(piece)
        if size > most:
            raise hostile(f"a layer has {layer.size} bytes that unpack to more than {most}")
        yield piece


def _gunzip(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Yield the content of all members of a gzip stream (RFC 1952), in bounded pieces."""
    machine = zlib.decompressobj(31)
    for chunk in chunks:
        rest = chunk
        while rest:
            if machine.eof:
                machine = zlib.decompressobj(31)
            yield machine.decompress(rest, _BUFFER)
            rest = machine.unused_data if machine.eof else machine.unconsumed_tail
    yield machine.flush()
    if not machine.eof:
        raise EOFError("the gzip stream ends early")


@cache
def _library() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(_LIBRARY)
        library.ZSTD_createDStream.restype = ctypes.c_void_p
        library.ZSTD_freeDStream.argtypes = (ctypes.c_void_p,)
        library.ZSTD_decompressStream.restype = ctypes.c_size_t
        library.ZSTD_decompressStream.argtypes = (
            ctypes.c_void_p,
            ctypes.POINTER(_Buffer),
            ctypes.POINTER(_Buffer),
        )
        library.ZSTD_isError.argtypes = (ctypes.c_size_t,)
        library.ZSTD_getErrorName.argtypes = (ctypes.c_size_t,)
        library.ZSTD_getErrorName.restype = ctypes.c_char_p
    except (OSError, AttributeError):
        return None
    return library


def can_read_zstd() -> bool:
    """Return whether this machine has the library."""
    return _library() is not None


def _unzstd(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Yield the content of all frames of a zstd stream, in bounded pieces.

    Raises ValueError for what is no zstd, EOFError for a stream that ends early.
    """
    library = _library()
    if library is None:
        raise ValueError(f"this machine has no {_LIBRARY}")
    stream = library.ZSTD_createDStream()
    space = ctypes.create_string_buffer(_BUFFER)
    missing = 1  # what the library still wants of a frame: 0 at the end of one
    try:
        for chunk in chunks:
            given = _Buffer(_address(ctypes.c_char_p(chunk)), len(chunk), 0)
            made = _Buffer(_address(space), _BUFFER, 0)
            while given[2] < given[1] or (missing and made[2] == _BUFFER):
                made[2] = 0
                missing = library.ZSTD_decompressStream(
                    stream, ctypes.byref(made), ctypes.byref(given)
                )
                if library.ZSTD_isError(missing):
                    raise ValueError(library.ZSTD_getErrorName(missing).decode())
                yield space.raw[: made[2]]
    finally:
        library.ZSTD_freeDStream(stream)
    if missing:
        raise EOFError("the zstd stream ends early")


def _address(buffer: ctypes.c_char_p | ctypes.Array[ctypes.c_char]) -> int:
    return ctypes.cast(buffer, ctypes.c_void_p).value or 0


def first_collision(base: Image, folders: Collection[str], memo: Memo) -> str:
    """Return a path of the base in one of the folders, or in place of one; empty if there is none.

    `folders` have no leading or trailing slash. Each layer is read once; the result is cached.
    Raises InputRefused for a damaged layer.
    """
    for layer in base.layers:
        key = json.dumps(["collisions", layer.digest, sorted(folders)])
        if found := memo(key, lambda layer=layer: _collision(layer, folders)):  # type: ignore[misc]
            return found
    return ""


def _collision(layer: Layer, folders: Collection[str]) -> str:
    """Return the first collision; the whole layer is read, so its digest is verified."""
    found = ""
    for entry in entries(layer):
        path = "/".join(part for part in entry.name.split("/") if part not in ("", "."))
        shown = path.replace(".wh..wh..opq", "").replace(".wh.", "")
        for folder in folders:
            inside = f"{shown}/".startswith(f"{folder}/")
            above = f"{folder}/".startswith(f"{shown}/") and bool(shown)
            if (inside or above) and not (entry.isdir() and path == shown):
                found = found or path
    return found
