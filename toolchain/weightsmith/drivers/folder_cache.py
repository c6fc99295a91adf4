"""A shared cache in a folder, such as one on a network file system.

entries/<key>.json     documents; renamed into place after the blobs that they name
entries/<key>.blobs    digest and size of each of these blobs, for cleaning
blobs/<2>/<sha256>     blobs by digest
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from weightsmith.errors import EnvironmentFailure
from weightsmith.files import is_unfinished, replace_file
from weightsmith.ports import Kept
from weightsmith.trees import below
from weightsmith.values import Blob, Digest

_CHUNK = 1 << 20
_SMALL = 16 << 20
_BEING_WRITTEN = 86400
"""Seconds in which a blob without an entry may be one that is being written."""


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
                os.utime(path)
        return document

    def read(self, blob: Blob) -> Iterator[bytes]:
        """Yield a blob's bytes."""
        return _chunks(self._blob(blob.digest), blob.size)

    def write(
        self,
        key: Digest,
        document: bytes,
        blobs: Sequence[tuple[Blob, Callable[[], Iterator[bytes]]]],
    ) -> int:
        """Write the missing blobs, then the document."""
        self.root.mkdir(exist_ok=True)  # not its parents: a share that is not mounted stays empty
        sent = 0
        for blob, opener in blobs:
            path = self._blob(blob.digest)
            with suppress(OSError):
                if path.stat().st_size == blob.size:
                    os.utime(path)
                    continue
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, opener())
            sent += blob.size
        path = self._entry(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        named = "".join(f"{blob.digest.hex} {blob.size}\n" for blob, _ in blobs)
        replace_file(path.with_suffix(".blobs"), (named.encode(),))
        replace_file(path, (document,))
        return sent + len(document)

    def discard(self, blob: Blob) -> None:
        """Delete a blob."""
        self._blob(blob.digest).unlink(missing_ok=True)

    def entries(self) -> Iterator[Kept]:
        """Yield every entry; blobs that several have count for each. OSError as in `find`."""
        if self._is_lost():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self.root))
        for path in _files(self.root / "entries", ".json"):
            with suppress(OSError, ValueError):
                size = sum(_blobs_of(path).values()) + path.stat().st_size
                key = Digest(f"sha256:{path.stem}")
                yield Kept(key=key, size=size, used=path.stat().st_mtime)

    def remove(self, keys: Collection[Digest]) -> int:
        """Delete entries, then blobs that no entry names."""
        freed, gone = 0, set[str]()
        for key in keys:
            with suppress(OSError, ValueError):
                gone.update(_blobs_of(self._entry(key)))
            for path in (self._entry(key), self._entry(key).with_suffix(".blobs")):
                with suppress(FileNotFoundError):
                    freed += path.stat().st_size
                    path.unlink()
        named = set[str]()
        for path in _files(self.root / "entries", ".json"):
            try:
                named.update(_blobs_of(path))  # `|=` with keys copies the whole set
            except (FileNotFoundError, ValueError):  # its blobs are not known: it goes before them
                path.unlink(missing_ok=True)
        young = time.time() - _BEING_WRITTEN
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


def _blobs_of(entry: Path) -> dict[str, int]:
    rows = entry.with_suffix(".blobs").read_text().splitlines()
    return {name: int(size) for name, _, size in (row.partition(" ") for row in rows)}


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
    """Yield a regular file of at most so many bytes; a link, a pipe or more is refused."""
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode) or status.st_size > most:
            raise EnvironmentFailure(
                f"{path} is not a regular file of the expected size", hint="delete it"
            )
        while chunk := os.read(handle, _CHUNK):
            yield chunk
    finally:
        os.close(handle)
