"""A shared cache in a folder, such as one on a network file system.

entries/<key>.json     documents; renamed into place after the blobs that they name
entries/<key>.blobs    digest and size of each of these blobs, for cleaning
blobs/<2>/<sha256>     blobs by digest
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from weightsmith.core.errors import InputRefused
from weightsmith.core.files import is_unfinished, marked, replace_file
from weightsmith.core.ports import CacheUse, OpenedBlob
from weightsmith.core.trees import below, remove
from weightsmith.core.values import Blob, Digest

_CHUNK = 1 << 20
_SMALL = 16 << 20
_BEING_WRITTEN = 86400
"""Seconds in which a blob without an entry may be one that is being written."""
_NO_FILE = frozenset({errno.ELOOP, errno.ENXIO})
"""What the kernel says of a link, and of a socket."""
_ROW = re.compile(r"[0-9a-f]{64} [0-9]{1,15}", re.ASCII)


class FolderCache:
    """Files in a folder that several machines mount; needs no locks."""

    origin = ("", "")

    def __init__(self, root: Path) -> None:
        self.root = root
        self.where = str(root)

    def find(self, key: Digest, *, use: bool = True) -> bytes | None:
        """Return the entry's document; OSError if the folder is not there."""
        path = self._entry(key)
        try:
            document = b"".join(_chunks(path, _SMALL))
        except FileNotFoundError:
            if self._is_lost():
                raise
            return None
        if use:
            with suppress(OSError):
                os.utime(path, follow_symlinks=False)
        return document

    def read(self, blob: Blob) -> Iterator[bytes]:
        """Yield a blob's bytes."""
        return _chunks(self._blob(blob.digest), blob.size)

    def write(self, key: Digest, document: bytes, blobs: Sequence[OpenedBlob]) -> int:
        """Write the missing blobs, then the document."""
        self.root.mkdir(exist_ok=True)  # not its parents: a share that is not mounted stays empty
        sent = 0
        for blob, opener in blobs:
            path = self._blob(blob.digest)
            with suppress(OSError):
                status = path.lstat()
                if stat.S_ISREG(status.st_mode) and status.st_size == blob.size:
                    os.utime(path, follow_symlinks=False)
                    continue
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, opener())
            sent += blob.size
        path = self._entry(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path.with_suffix(".blobs"), (to_rows(blob for blob, _ in blobs),))
        replace_file(path, (document,))
        return sent + len(document)

    def discard(self, blob: Blob) -> None:
        """Delete a blob."""
        self._blob(blob.digest).unlink(missing_ok=True)

    def entries(self) -> Iterator[CacheUse]:
        """Yield every entry; blobs that several have count for each. OSError as in `find`."""
        if self._is_lost():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self.root))
        for path in _files(self.root / "entries", ".json"):
            with suppress(OSError, ValueError, InputRefused):
                size = sum(_blobs_of(path).values()) + path.stat().st_size
                key = Digest(f"sha256:{path.stem}")
                yield CacheUse(key=key, size=size, used=path.stat().st_mtime)

    def remove(self, keys: Collection[Digest]) -> int:
        """Delete entries, then blobs that no entry names."""
        freed, gone = 0, set[str]()
        for key in keys:
            with suppress(OSError, InputRefused):
                gone.update(_blobs_of(self._entry(key)))
            for path in (self._entry(key), self._entry(key).with_suffix(".blobs")):
                with suppress(FileNotFoundError):
                    freed += path.lstat().st_size
                    remove(path)
        named = set[str]()
        for path in _files(self.root / "entries", ".json"):
            try:
                named.update(_blobs_of(path))  # `|=` with keys copies the whole set
            except (FileNotFoundError, InputRefused):  # unknown blobs: it goes before them
                for odd in (path, path.with_suffix(".blobs")):
                    remove(odd)
        young = 0.0
        if self.root.is_dir():
            # By the clock that stamps files here, which may be a file server's.
            with marked(self.root) as mark:
                young = (self.root / mark).stat().st_mtime - _BEING_WRITTEN
        for path in _files(self.root / "blobs"):
            with suppress(FileNotFoundError):  # another one cleans too
                status = path.stat()
                # One that was just written, or found by a writer, may be about to get an entry.
                if path.name not in named and (status.st_mtime < young or path.name in gone):
                    path.unlink()
                    freed += status.st_size
        return freed

    def _is_lost(self) -> bool:
        """Say whether even the folder is missing that the cache would be made in."""
        return not self.root.is_dir() and not self.root.parent.is_dir()

    def _entry(self, key: Digest) -> Path:
        return self.root / "entries" / f"{key.hex}.json"

    def _blob(self, digest: Digest) -> Path:
        return self.root / "blobs" / digest.hex[:2] / digest.hex


def to_rows(blobs: Iterable[Blob]) -> bytes:
    """Return the list of an entry's blobs, one a line."""
    return "".join(f"{blob.digest.hex} {blob.size}\n" for blob in blobs).encode()


def of_rows(data: bytes, where: str) -> dict[str, int]:
    """Return sizes by digest from such a list; raises InputRefused for anything else."""
    rows = data.decode("ascii", "replace").splitlines()
    if bad := [row for row in rows if not _ROW.fullmatch(row)]:
        raise InputRefused(f"{where} is no list of blobs: {bad[0][:80]!r}", hint="delete it")
    return {row[:64]: int(row[65:]) for row in rows}


def _blobs_of(entry: Path) -> dict[str, int]:
    path = entry.with_suffix(".blobs")
    return of_rows(b"".join(_chunks(path, _SMALL)), str(path))


def _files(folder: Path, suffix: str = "") -> Iterator[Path]:
    for path in sorted(below(folder)) if folder.is_dir() else ():
        if (
            path.name.endswith(suffix)
            and path.is_file()
            and not path.is_symlink()
            and not is_unfinished(path.name)
        ):
            yield path


def _chunks(path: Path, most: int) -> Iterator[bytes]:
    """Yield a regular file of at most so many bytes; InputRefused for a link, a pipe or more."""
    refused = InputRefused(f"{path} is not a regular file of the expected size", hint="delete it")
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in _NO_FILE:
            raise refused from None
        raise
    left = most
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode) or status.st_size > most:
            raise refused
        while chunk := os.read(handle, _CHUNK):
            left -= len(chunk)
            if left < 0:  # it grows while it is read
                raise refused
            yield chunk
    finally:
        os.close(handle)
