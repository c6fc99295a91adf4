"""Reads layers as tar archives, with any compression."""

from __future__ import annotations

import hashlib
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, cast

from weightsmith.core.errors import InputRefused
from weightsmith.oci import manifests, zstd
from weightsmith.oci.layers import LAYER_TAR, Layer

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
        _read_on(chunks)
        raise
    except (tarfile.TarError, zlib.error, ValueError, EOFError) as error:
        _read_on(chunks)
        raise InputRefused(
            f"the layer {layer.digest.short} cannot be unpacked: {str(error)[:200]}",
            hint="the image is damaged; pull or build it again",
        ) from None


def _read_on(chunks: Iterator[bytes]) -> None:
    for _ in chunks:
        pass


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
                raise _hostile(f"extended headers of {self.size} bytes, {chained} in a row")
            archive.chained = chained  # type: ignore[attr-defined]
        found: tarfile.TarInfo = super()._proc_member(archive)  # type: ignore[misc]
        archive.chained = 0  # type: ignore[attr-defined]
        if found.issparse():
            raise _hostile(f"a sparse file, {found.name[:100]!r}")
        if found.size < 0:
            raise _hostile(f"a file of {found.size} bytes, {found.name[:100]!r}")
        return found


def _hostile(what: str) -> InputRefused:
    return InputRefused(
        f"a layer has {what}", hint="the image is damaged or hostile; do not use it"
    )


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
        if not zstd.can_decompress():
            raise InputRefused(
                f"the layer {layer.digest.short} is compressed with zstd, which this machine cannot"
                " read",
                hint="install libzstd (the package libzstd1, libzstd or zstd-libs), or use an image"
                " with gzip layers",
            )
        return _bounded(zstd.decompress(chunks), layer)
    return _bounded(_gunzip(chunks), layer)


def _bounded(pieces: Iterator[bytes], layer: Layer) -> Iterator[bytes]:
    most, size = max(_LEAST_ROOM, _MOST_RATIO * layer.size), 0
    for piece in pieces:
        size += len(piece)
        if size > most:
            raise _hostile(f"{layer.size} bytes that unpack to more than {most}")
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
