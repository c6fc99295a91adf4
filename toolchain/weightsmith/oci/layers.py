"""Lazy layers: a layer knows its digest and size, and makes its bytes only when asked."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol, TypeAlias

from weightsmith.checkpoints.reading import read_file
from weightsmith.checkpoints.reshard import read_pieces
from weightsmith.errors import InputRefused, UsageError, WeightsmithError
from weightsmith.oci import tar
from weightsmith.oci.references import Reference
from weightsmith.values import Blob, Digest, Pieces, key_of

LAYER_TAR = "application/vnd.oci.image.layer.v1.tar"
CHUNK = 1 << 20
_GATHER = 128 << 10
"""Bytes; smaller pieces of a layer are joined before they are hashed and sent."""
TAR_RECIPE = 1
"""Raised when the same members would give other bytes, so that no remembered digest is wrong."""

Memo: TypeAlias = Callable[[str, Callable[[], str]], str]
"""`memo(key, make)` returns what it remembers for the key, or calls `make` and remembers that."""


class Layer(Protocol):
    """One file system layer."""

    @property
    def digest(self) -> Digest:
        """Digest of the bytes as stored."""

    @property
    def diff_id(self) -> Digest:
        """Digest of the uncompressed tar."""

    @property
    def size(self) -> int:
        """Bytes as stored."""

    @property
    def media_type(self) -> str:
        """The layer's media type, which says how it is compressed."""

    @property
    def file(self) -> str:
        """What it holds, for reports; empty where that is not known."""

    def open(self) -> Iterator[bytes]:
        """Yield the stored bytes in chunks of about 1 MiB.

        The iterator closes what it opened when it ends or is closed; the caller opens nothing.
        """


@dataclass(frozen=True, slots=True)
class Member:
    """One regular file of a layer: its path in the image, and where its bytes come from."""

    path: str
    size: int
    mode: int
    """Only whether the owner may execute it counts: it becomes 0755 or 0644."""
    source: Path | bytes | Pieces
    digest: Digest | None = None
    """Digest of the content where it is known: the key under which a layer is remembered."""

    @classmethod
    def of_bytes(cls, path: str, data: bytes, mode: int = 0o644) -> Member:
        """Return a member whose content is in memory."""
        return cls(path, len(data), mode, data, Digest.of(data))

    @classmethod
    def of_file(cls, path: str, source: Path, digest: Digest | None = None) -> Member:
        """Return a member that is read from a file when the layer is; OSError if it is absent."""
        status = source.stat()
        return cls(path, status.st_size, status.st_mode, source, digest)


@dataclass(frozen=True, kw_only=True)
class TarLayer:
    """An uncompressed layer made of files on the fly; same files, same bytes, on every machine.

    Owner and group are 0, times are `epoch`, parent folders are entries of mode 0755.
    Raises UsageError for paths that leave the image or meet twice.
    """

    members: tuple[Member, ...]
    epoch: int = field(default_factory=tar.source_date_epoch)
    memo: Memo | None = None
    known_digest: Digest | None = None
    shared: tuple[str, ...] = ()
    """Folders that every user may write to, mode 1777, such as `tmp`."""

    media_type = LAYER_TAR

    def __post_init__(self) -> None:
        """Normalise, check and sort the members."""
        cleaned = [_clean(member) for member in self.members]
        cleaned.sort(key=lambda member: member.path.split("/"))
        object.__setattr__(self, "members", tuple(cleaned))
        paths = [member.path for member in cleaned]
        twice = {path for path, n in Counter(paths).items() if n > 1}
        clash = twice | (set(paths) & set(self.folders))
        if clash:
            raise UsageError(
                f"the image path /{min(clash)} is written twice in one layer",
                hint="rename one of the two files",
            )

    @cached_property
    def folders(self) -> tuple[str, ...]:
        """All parent folders, without a slash at the end, parents first."""
        found: set[str] = set(self.shared)
        for member in self.members:
            parts = member.path.split("/")
            found.update("/".join(parts[:n]) for n in range(1, len(parts)))
        return tuple(sorted(found, key=lambda path: path.split("/")))

    @cached_property
    def size(self) -> int:
        """Bytes of the tar, worked out without reading a file."""
        headers = sum(len(head) for head, _ in self._entries())
        bodies = sum(-(-member.size // tar.BLOCK) * tar.BLOCK for member in self.members)
        return headers + bodies + len(tar.END)

    @cached_property
    def digest(self) -> Digest:
        """Digest of the tar: known, remembered, or worked out in one pass over the files."""
        if self.known_digest:
            return self.known_digest
        key = self.key
        return Digest(self.memo(key, self._hash) if self.memo and key else self._hash())

    @property
    def diff_id(self) -> Digest:
        """The digest: nothing is compressed."""
        return self.digest

    @property
    def key(self) -> str:
        """What the bytes depend on, or empty where a member's content digest is not known."""
        if any(member.digest is None for member in self.members):
            return ""
        facts = [(m.path, m.size, m.mode, m.digest) for m in self.members]
        made_of = {"layer": facts, "epoch": self.epoch, "recipe": TAR_RECIPE}
        return key_of(made_of | ({"shared": self.shared} if self.shared else {}))

    @property
    def file(self) -> str:
        """The one member's path, or the first one's and how many more there are."""
        if not self.members:
            return ""
        more = len(self.members) - 1
        return self.members[0].path + (f" and {more} more" if more else "")

    def open(self) -> Iterator[bytes]:
        """Yield the tar; InputRefused names a file that changed since it was looked at."""
        return _gathered(self._pieces())

    def _pieces(self) -> Iterator[bytes]:
        for head, member in self._entries():
            yield head
            if member is None:
                continue
            yield from _content(member)
            yield tar.padding(member.size)
        yield tar.END

    def _entries(self) -> Iterator[tuple[bytes, Member | None]]:
        rows: list[tuple[str, Member | None]] = [(path, None) for path in self.folders]
        rows += [(member.path, member) for member in self.members]
        for path, member in sorted(rows, key=lambda row: row[0].split("/")):
            size, mode = (member.size, member.mode) if member else (0, self._folder_mode(path))
            yield (
                tar.header(path, size=size, mode=mode, mtime=self.epoch, folder=member is None),
                member,
            )

    def _folder_mode(self, path: str) -> int:
        return 0o1777 if path in self.shared else 0o755

    def is_as_hashed(self) -> bool:
        """Say whether its files are still those that were read for the digest, in this process."""
        hashed = self.__dict__.get("_hashed")
        return hashed is not None and hashed == self._stamps()

    def _stamps(self) -> tuple[tuple[int, ...], ...] | None:
        """Return its files' inodes, sizes and times, where a change shows; None if one is gone."""
        try:
            found = [path.stat() for member in self.members for path in _paths(member.source)]
        except OSError:
            return None
        return tuple((f.st_ino, f.st_size, f.st_mtime_ns, f.st_ctime_ns) for f in found)

    def _hash(self) -> str:
        stamps = self._stamps()
        state = hashlib.sha256()
        for chunk in self.open():
            state.update(chunk)
        self.__dict__["_hashed"] = stamps
        return f"sha256:{state.hexdigest()}"


def _gathered(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Join small pieces: a layer of 100,000 small files is some hundred writes then."""
    held: list[bytes] = []
    size = 0
    for piece in pieces:
        if size and size + len(piece) > _GATHER:
            yield b"".join(held)
            held, size = [], 0
        if len(piece) >= _GATHER:
            yield piece
        else:
            held.append(piece)
            size += len(piece)
    if size:
        yield b"".join(held)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobLayer:
    """A layer that a registry or a layout already holds."""

    blob: Blob
    diff_id: Digest
    opener: Callable[[], Iterator[bytes]]
    """Yields verified bytes."""
    file: str = ""
    origin: Reference | None = None
    """The repository it is in, where it can be mounted from."""

    @property
    def digest(self) -> Digest:
        """Digest of the bytes as stored."""
        return self.blob.digest

    @property
    def size(self) -> int:
        """Bytes as stored."""
        return self.blob.size

    @property
    def media_type(self) -> str:
        """As its manifest gave it."""
        return self.blob.media_type

    def open(self) -> Iterator[bytes]:
        """Yield the stored bytes; InputRefused at the end if they are not what was promised."""
        return self.opener()


def verified(
    chunks: Iterable[bytes],
    blob: Blob,
    where: str,
    hint: str = "it is damaged or was tampered with; write or push the image again",
    kind: type[WeightsmithError] = InputRefused,
) -> Iterator[bytes]:
    """Pass chunks on; raises `kind` if they are not exactly the blob's size and digest.

    The last one is passed on only when all are right: who waits for it never has a whole blob
    that is wrong.
    """
    state = hashlib.sha256()
    size = 0
    held = b""
    for chunk in chunks:
        if held:
            yield held
        held = chunk
        state.update(chunk)
        size += len(chunk)
        if size > blob.size:
            break
    if size != blob.size or state.hexdigest() != blob.digest.hex:
        raise kind(
            f"{where}: the blob {blob.digest.short} does not have the content its digest promises",
            hint=hint,
        )
    if held:
        yield held


def _paths(source: Path | bytes | Pieces) -> list[Path]:
    match source:
        case bytes():
            return []
        case tuple() as pieces:
            return [piece.path for piece in pieces if not isinstance(piece, bytes)]
        case path:
            return [path]


def _content(member: Member) -> Iterator[bytes]:
    match member.source:
        case bytes() as data:
            yield data
        case tuple() as pieces:
            yield from read_pieces(pieces)
        case path:
            yield from read_file(path, member.size)


def _clean(member: Member) -> Member:
    path = member.path.lstrip("/")
    parts = path.split("/")
    try:
        path.encode()
    except UnicodeEncodeError:
        raise InputRefused(
            f"the file name {member.path!r} is not UTF-8", hint="rename the file"
        ) from None
    if "\0" in path or any(part in ("", ".", "..") for part in parts):
        raise UsageError(f"{member.path!r} is not a path inside an image", hint="rename the file")
    if any(part.startswith(".wh.") for part in parts):
        raise UsageError(
            f"{member.path!r} would delete files: '.wh.' marks whiteouts in layers",
            hint="rename the file",
        )
    mode = 0o755 if member.mode & 0o100 else 0o644
    return Member(path, member.size, mode, member.source, member.digest)
