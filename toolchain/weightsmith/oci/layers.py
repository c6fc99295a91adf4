"""Lazy layers: a layer knows its digest and size, and makes its bytes only when asked."""

from __future__ import annotations

import hashlib
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TypeAlias

from weightsmith.core.errors import InputRefused, UsageError, WeightsmithError
from weightsmith.core.values import Blob, Digest, Pieces, Stream, key_of
from weightsmith.models.reshard import read_file, read_pieces
from weightsmith.oci import tar
from weightsmith.oci.references import Reference

LAYER_TAR = "application/vnd.oci.image.layer.v1.tar"
TITLE = "org.opencontainers.image.title"
FILE_PATH = "org.cncf.model.filepath"
"""Annotation of a ModelPack's layer: the file's path in the model's folder."""
_CHANGED = "it changed while it was packed; run the command again"
CHUNK = 1 << 20
_SUFFIX = ".tar"
"""Of an uncompressed tar's media type, in an image and in a ModelPack."""
_GATHER = 128 << 10
"""Bytes; smaller pieces of a layer are joined before they are hashed and sent."""
TAR_RECIPE = 2
"""Increased when the same members would give other bytes, so that cached digests stay valid."""

FileSource: TypeAlias = Path | Pieces | Stream
Source: TypeAlias = FileSource | bytes
"""Where a file's bytes come from."""
Memo: TypeAlias = Callable[[str, Callable[[], str]], str]
"""`memo(key, make)` returns the text cached under the key, or calls `make` and caches that."""

Advance: TypeAlias = Callable[[int, int], None]
"""Called with bytes done and total bytes; from any thread, never from two at once."""


@dataclass(frozen=True, slots=True)
class Member:
    """One regular file of a layer: its path in the image, and the source of its bytes."""

    path: str
    size: int
    mode: int
    """Only the owner's execute bit counts: the mode becomes 0755 or 0644."""
    source: Source
    digest: Digest | None = None
    """Digest of the content if known; without it the layer's digest is not cached."""

    @classmethod
    def of_bytes(cls, path: str, data: bytes, mode: int = 0o644) -> Member:
        """Return a member whose content is in memory."""
        return cls(path, len(data), mode, data, Digest.of(data))

    @classmethod
    def of_file(cls, path: str, source: Path, digest: Digest | None = None) -> Member:
        """Return a member that is read from a file when the layer is; OSError if there is none."""
        status = source.stat()
        return cls(path, status.st_size, status.st_mode, source, digest)


@dataclass(frozen=True, kw_only=True)
class TarLayer:
    """An uncompressed layer, generated from files; same files, same bytes, on every machine.

    Owner and group are 0, times are `epoch`, parent folders are entries of mode 0755.
    Raises UsageError for paths that leave the image or occur twice.
    """

    members: tuple[Member, ...]
    epoch: int = field(default_factory=tar.source_date_epoch)
    memo: Memo | None = None
    known_digest: Digest | None = None
    shared: tuple[str, ...] = ()
    """Folders that every user may write to (mode 1777), such as `tmp`."""

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
        """All parent folders without a trailing slash, parents first."""
        found: set[str] = set(self.shared)
        for member in self.members:
            parts = member.path.split("/")
            found.update("/".join(parts[:n]) for n in range(1, len(parts)))
        return tuple(sorted(found, key=lambda path: path.split("/")))

    @cached_property
    def size(self) -> int:
        """Bytes of the tar, computed without reading a file."""
        headers = sum(len(head) for head, _ in self.entries())
        bodies = sum(-(-member.size // tar.BLOCK) * tar.BLOCK for member in self.members)
        return headers + bodies + len(tar.END)

    @cached_property
    def digest(self) -> Digest:
        """Digest of the tar: given, cached, or computed in one pass over the files."""
        if self.known_digest:
            return self.known_digest
        key = self.key
        return Digest(self.memo(key, self._hash) if self.memo and key else self._hash())

    @property
    def diff_id(self) -> Digest:
        """Same as the digest, since nothing is compressed."""
        return self.digest

    @property
    def key(self) -> str:
        """What the bytes depend on, or empty if the digest of a member is unknown."""
        if any(member.digest is None for member in self.members):
            return ""
        facts = [(m.path, m.size, m.mode, m.digest) for m in self.members]
        made_of = {"layer": facts, "epoch": self.epoch, "recipe": TAR_RECIPE}
        return key_of(made_of | ({"shared": self.shared} if self.shared else {}))

    @property
    def file(self) -> str:
        """The only member's path, or the first one's and the number of others."""
        if not self.members:
            return ""
        more = len(self.members) - 1
        return self.members[0].path + (f" and {more} more" if more else "")

    @property
    def annotations(self) -> Mapping[str, str]:
        """What it contains, so that the manifest says which layer holds which file."""
        return title_of(self.file, self.media_type)

    def open(self) -> Iterator[bytes]:
        """Yield the tar; raises InputRefused for a file that has changed in the meantime."""

        def pieces() -> Iterator[bytes]:
            for head, member in self.entries():
                yield head
                if member is not None:
                    yield from _content(member)
                    yield tar.padding(member.size)
            yield tar.END

        return _gathered(pieces())

    def entries(self) -> Iterator[tuple[bytes, Member | None]]:
        """Yield each entry's header, and its file, which follows; None for a folder."""
        rows: list[tuple[str, Member | None]] = [(path, None) for path in self.folders]
        rows += [(member.path, member) for member in self.members]
        for path, member in sorted(rows, key=lambda row: row[0].split("/")):
            size, mode = 0, 0o1777 if path in self.shared else 0o755
            if member:
                size, mode = member.size, member.mode
            head = tar.header(path, size=size, mode=mode, mtime=self.epoch, folder=member is None)
            yield head, member

    def is_as_hashed(self) -> bool:
        """Say whether this process computed the digest and the files have not changed since."""
        hashed = self.__dict__.get("_hashed")
        return hashed is not None and hashed == self._stamps()

    def _stamps(self) -> tuple[tuple[int, ...], ...] | None:
        """Return the files' inodes, sizes and times, to detect changes; None if a file is gone."""
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
    """Join small pieces, so that a layer of 100,000 small files takes a few hundred writes."""
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
    """A layer that a registry or a layout already has."""

    blob: Blob
    diff_id: Digest
    opener: Callable[[], Iterator[bytes]]
    """Yields verified bytes."""
    file: str = ""
    origin: Reference | None = None
    """The repository that it can be mounted from."""

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
        """The media type in its manifest."""
        return self.blob.media_type

    @property
    def annotations(self) -> Mapping[str, str]:
        """What it contains, if that is known."""
        return title_of(self.file, self.media_type)

    def open(self) -> Iterator[bytes]:
        """Yield the stored bytes; InputRefused at the end if they do not match the digest."""
        return self.opener()


@dataclass(frozen=True, slots=True, kw_only=True)
class FileLayer:
    """A layer that is one file's own bytes, as in a ModelPack; it has no owner, mode or time."""

    file: str
    """The file's path."""
    size: int
    digest: Digest
    source: FileSource
    media_type: str
    annotations: Mapping[str, str]

    @property
    def diff_id(self) -> Digest:
        """Same as the digest, since nothing is packed or compressed."""
        return self.digest

    def open(self) -> Iterator[bytes]:
        """Yield the file; InputRefused if it has changed since it was hashed."""
        blob = Blob(digest=self.digest, size=self.size, media_type=self.media_type)
        member = Member(self.file, self.size, 0o644, self.source)
        return verified(_content(member), blob, self.file, hint=_CHANGED)


@dataclass(frozen=True, slots=True)
class NamedLayer:
    """A tar layer of an image under a ModelPack's media type: the same blob."""

    layer: TarLayer
    media_type: str

    @property
    def digest(self) -> Digest:
        """Digest of the tar."""
        return self.layer.digest

    diff_id = digest

    @property
    def size(self) -> int:
        """Bytes of the tar."""
        return self.layer.size

    @property
    def file(self) -> str:
        """What it contains."""
        return self.layer.file

    @property
    def annotations(self) -> Mapping[str, str]:
        """What it contains, also by a ModelPack's annotation."""
        return {**title_of(self.file, self.media_type), FILE_PATH: self.file}

    def open(self) -> Iterator[bytes]:
        """Yield the tar."""
        return self.layer.open()


Layer: TypeAlias = TarLayer | BlobLayer | FileLayer | NamedLayer
"""A part of a file system, or in a ModelPack one file: what it is, and its bytes on demand."""


def checked_opener(layer: Layer, blob: Blob) -> Callable[[], Iterator[bytes]]:
    """Return an opener that yields bytes of the layer's digest, or raises InputRefused at the end.

    What this process has just hashed is not hashed again: that takes as long as reading it.
    """
    made = layer.layer if isinstance(layer, NamedLayer) else layer
    if not isinstance(made, TarLayer) or made.is_as_hashed():
        return layer.open  # others verify what they read
    what = layer.file or "a layer"
    hint = "a file changed since it was hashed; build again"
    return lambda: verified(layer.open(), blob, what, hint)


def title_of(file: str, media_type: str) -> dict[str, str]:
    """Return the annotation that says what a layer holds, {} if that is unknown.

    Programs such as oras name the file that they write by it, so a tar's title ends with `.tar`.
    """
    suffix = _SUFFIX if media_type.endswith(_SUFFIX) else ""
    return {TITLE: file + suffix} if file else {}


def file_of(title: str, media_type: str) -> str:
    """Return what a layer with this title holds: the inverse of `title_of`."""
    return title.removesuffix(_SUFFIX) if media_type.endswith(_SUFFIX) else title


def verified(
    chunks: Iterable[bytes],
    blob: Blob,
    where: str,
    hint: str
    | Callable[[], str] = "it is damaged or was tampered with; write or push the image again",
    kind: type[WeightsmithError] = InputRefused,
) -> Iterator[bytes]:
    """Pass chunks on; raises `kind` unless they have exactly the blob's size and digest.

    The last chunk is passed on only after the check, so no caller ever has a complete, wrong blob.
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
            f"{where}: the content of the blob {blob.digest.short} does not match its digest",
            hint=hint if isinstance(hint, str) else hint(),
        )
    if held:
        yield held


def _paths(source: Source) -> list[Path]:
    match source:
        case bytes() | Stream():
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
        case Stream() as stream:
            yield from stream.open()
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


class Meter:
    """Sums up the progress of pieces, each of which may start over."""

    def __init__(self, total: int, advance: Advance | None = None) -> None:
        self._total = total
        self._advance = advance
        self._pieces: dict[object, int] = {}
        self._done = 0
        self._lock = threading.Lock()

    def reach(self, piece: object, done: int) -> None:
        """Set how many bytes of a piece are done."""
        with self._lock:
            self._done += done - self._pieces.get(piece, 0)
            self._pieces[piece] = done
            if self._advance:
                self._advance(self._done, self._total)

    def counted(self, piece: object, chunks: Iterable[bytes]) -> Iterator[bytes]:
        """Pass a piece's chunks on and count them, starting at 0."""
        done = 0
        for chunk in chunks:
            yield chunk
            done += len(chunk)
            self.reach(piece, done)
