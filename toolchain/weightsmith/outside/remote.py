"""Files at a remote place, streamed into the store once: listed, chosen, resumed and checked.

What lists and reads them is a `Remote`; everything else is the same for all of them. A list is
checked before anything is fetched: names that leave the folder and models that are only pickles
are refused. Small files come first, so that a model with code of its own is refused before its
weights are here. A file that broke off goes on where it ended, also in the next run.
"""

from __future__ import annotations

import hashlib
import os
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Protocol

from weightsmith.core.errors import Altered, EnvironmentFailure, InputRefused, UsageError
from weightsmith.core.files import write_whole
from weightsmith.core.ports import Progress, Store
from weightsmith.core.trees import below, remove
from weightsmith.core.values import (
    Digest,
    FileEntry,
    JsonValue,
    Snapshot,
    Tree,
    UnreadDigest,
    Writable,
    canonical,
    key_of,
)
from weightsmith.models.folder import MAX_DEPTH, check_no_code, is_pickle, is_used
from weightsmith.outside.archives import WEIGHTS, extract, require_weights

_RECIPE_NUMBER = 1
INCOMING = ".incoming"
"""Folder of what is not whole; no model has files of such a name."""
_CHUNK = 1 << 20
_MOST_FILES = 20_000
_LARGEST = 4 << 40
"""Bytes of a file whose size is not known."""
_LENGTH = 8
"""Bytes at the start of a safetensors file that say how long its header is."""
_FIRST = 1 << 20
"""Bytes of a weights file that have its whole header, seldom not."""
_LARGEST_HEADER = 100_000_000
"""Bytes, as in the safetensors library."""
_PAUSES = (1.0, 5.0, 20.0)
"""Seconds before the second and further tries without progress."""


class Broken(Exception):
    """A connection that broke, or a server that may answer the next time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteFile:
    """One file of a list, and what its sender says of it."""

    path: str
    """Relative, with `/`."""
    size: int = -1
    """In bytes; -1 if it is not known."""
    digest: Digest | None = None
    md5: str = ""
    """Hexadecimal, if the sender has no digest."""
    version: str = ""
    """What is another after a change, such as an ETag."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """An opened source: its list, and how to read it."""

    pin: str
    pinned: bool
    files: Sequence[RemoteFile]
    read: Callable[[RemoteFile, int, int], Iterator[bytes]]
    """Yields a file's bytes from an offset on, to the other if that is not -1, or a little more.

    Raises Broken if that may be tried again, Altered if what came is another file's.
    """
    hint: str
    """What to do if it cannot be reached."""
    is_archive: bool = False
    """Whether the only file is unpacked."""
    pinned_bytes: bool = False
    """Whether the files' digests are the user's own pin, and not what a sender says of them."""
    take: Callable[[RemoteFile, Path], Path] | None = None
    """Writes a whole file into a new folder, for a client that cannot begin in its middle."""
    make: Callable[[Path, Progress], dict[str, str]] | None = None
    """Writes the files to `model` in a folder and returns their SHA-256, where no list has them.

    What a broken run left is in the folder.
    """
    size: int = 0
    """Bytes that `make` writes, at most."""


class SourceKind(Protocol):
    """A kind of sources, and what must be installed for it."""

    @property
    def scheme(self) -> str:
        """Of its sources."""

    @property
    def packages(self) -> Sequence[str]:
        """What must be installed, by the names that are imported."""

    @property
    def extra(self) -> str:
        """The extra that installs it."""


class Remote(SourceKind, Protocol):
    """One kind of place: what its sources mean, and who lists and reads them."""

    @property
    def where(self) -> str:
        """Which server the environment names, where a pin alone does not identify the bytes."""

    def pin_of(self, source: str, revision: str, sha256: str) -> str:
        """Return the pin that a recipe's values stand for, or empty if they pin nothing."""

    def open(self, source: str, revision: str, sha256: str, progress: Progress) -> Place:
        """List a source.

        Raises InputRefused if it does not exist, access is denied or its pin has other files;
        EnvironmentFailure if it cannot be reached.
        """


class RemoteReader:
    """Fetches the sources of one kind of place into the store."""

    def __init__(
        self, store: Store, remote: Remote, scratch: Callable[[], Path] | None = None
    ) -> None:
        """`scratch` returns a folder that lasts as long as the tools, for what `glance` reads."""
        self._store = store
        self._scratch = scratch
        self._remote = remote
        self.scheme = remote.scheme

    def check(self, source: str) -> None:
        """Raise UsageError if a package that reads this kind of source is not installed."""
        require_packages(self._remote, source)

    def fetch(self, source: str, revision: str, sha256: str, progress: Progress) -> Snapshot:
        """Return the source's files, those of the store if they are pinned and there."""
        if found := self.known(source, revision, sha256):
            return found
        self.check(source)
        place = self._remote.open(source, revision, sha256, progress)
        progress.note(f"fetching {source} (kept in the store)")
        note = self._note(place.pin)
        make = partial(_fetched, place, source, self._store, progress)
        entry = self._store.produce(key_of(note), note, make, resume=True)
        return Snapshot(tree=entry.tree, source=source, pin=place.pin, pinned=place.pinned)

    def known(self, source: str, revision: str, sha256: str) -> Snapshot | None:
        """Return the source's files if they are pinned and in the store."""
        pin = self._remote.pin_of(source, revision, sha256)
        entry = self._store.find(key_of(self._note(pin))) if pin else None
        return Snapshot(tree=entry.tree, source=source, pin=pin, pinned=True) if entry else None

    def glance(
        self, source: str, revision: str, sha256: str, progress: Progress
    ) -> Snapshot | None:
        """Return a list's small files, and of its weights the headers; None for other places."""
        if found := self.known(source, revision, sha256):
            return found
        self.check(source)
        place = self._remote.open(source, revision, sha256, progress)
        if self._scratch is None or place.make or place.take or place.is_archive:
            return None
        files = chosen_files(place.files, source)
        if any(file.size < 0 or file.path.endswith(".gguf") for file in files):
            return None
        root = self._scratch() / hashlib.sha256(place.pin.encode()).hexdigest()
        remove(root)
        try:
            entries = [_glanced(place, file, root / file.path) for file in files]
        except Broken as trouble:
            raise EnvironmentFailure(f"{source}: {trouble}", hint=place.hint) from None
        check_no_code(root, [file.path for file in files])
        tree = Tree(root=root, files=tuple(sorted(entries, key=lambda entry: entry.path)))
        return Snapshot(tree=tree, source=source, pin=place.pin, pinned=place.pinned)

    def _note(self, pin: str) -> dict[str, Writable]:
        where = {"where": self._remote.where} if self._remote.where else {}
        return {"stage": "source", "recipe": _RECIPE_NUMBER, "pin": pin, **where}


def require_packages(remote: Remote, source: str) -> None:
    """Raise UsageError if a package that reads a source is not installed."""
    missing = [name for name in remote.packages if find_spec(name) is None]
    if missing:
        raise UsageError(
            f"{source} needs the package {missing[0]}, which is not installed",
            hint=f"pip install 'weightsmith[{remote.extra}]'",
        )


def list_pin(files: Sequence[RemoteFile]) -> str:
    """Return the digest of a list: another if a file that is read was changed, added or removed."""
    rows = sorted(
        (one.path, one.size, str(one.digest or one.version or one.md5))
        for one in files
        if is_used(one.path)
    )
    return str(Digest.of(canonical(rows)))


def require_pin(source: str, wanted: str, found: str) -> None:
    """Raise InputRefused if a list is another than the pinned one."""
    if wanted and wanted != found:
        raise InputRefused(
            f"{source} is now {found[:19]}…, but its pin is {wanted[:19]}…: its files were "
            "changed, added or removed",
            hint="ask who keeps it why; to accept it, remove the pin (in recipe.lock: "
            "--update-lock)",
        )


def check_names(files: Sequence[RemoteFile], source: str) -> None:
    """Raise InputRefused for a list with names that leave the folder, or clash in it."""
    if len(files) > _MOST_FILES:
        raise InputRefused(
            f"{source} lists {len(files)} files; at most {_MOST_FILES} are read",
            hint="give the folder of a single model",
        )
    seen: dict[str, str] = {}
    for file in files:
        parts = file.path.split("/")
        if (
            not all(parts)
            or {".", ".."} & set(parts)
            or not file.path.isprintable()
            or "\\" in file.path
            or len(parts) > MAX_DEPTH
            or any(len(part.encode()) > 255 for part in parts)
        ):
            raise InputRefused(
                f"{source} lists a file with a path that leaves its folder, or cannot be one: "
                f"{file.path[:200]!r}",
                hint="do not use it: no tool that keeps models writes such a list",
            )
        folded = unicodedata.normalize("NFC", file.path).casefold()
        if folded in seen:
            raise InputRefused(
                f"{source} lists {seen[folded]!r} and {file.path!r}, which some file systems treat "
                "as the same file",
                hint="rename one of them where they are kept",
            )
        seen[folded] = file.path
    for folded, path in seen.items():
        if is_used(path) and (above := seen.keys() & set(map(str, PurePosixPath(folded).parents))):
            raise InputRefused(
                f"{source} lists {seen[above.pop()]!r} as a file and as the folder of {path!r}",
                hint="delete one of them where they are kept",
            )


def chosen_files(files: Sequence[RemoteFile], source: str) -> list[RemoteFile]:
    """Return the files of a model, small ones first; raises InputRefused if there is no weight."""
    check_names(files, source)
    used = [file for file in files if is_used(file.path)]
    pickles = [file.path for file in files if is_pickle(file.path)]
    require_weights([file.path for file in used], source, pickles)
    return sorted(used, key=lambda file: (file.path.endswith(WEIGHTS), file.path))


def _glanced(place: Place, file: RemoteFile, target: Path) -> FileEntry:
    """Write a file, of weights only the header and a hole; raises Altered if it is another."""
    is_weights = file.path.endswith(WEIGHTS)
    wanted = min(file.size, _FIRST) if is_weights else file.size
    data = _bytes(place, file, 0, wanted)
    if is_weights:
        length = int.from_bytes(data[:_LENGTH], "little")
        wanted = min(file.size, _LENGTH + min(length, _LARGEST_HEADER))
        data += _bytes(place, file, len(data), wanted) if wanted > len(data) else b""
        digest: Digest = UnreadDigest.of(canonical(["not read", place.pin, file.path]))
    else:
        content = _Content(file)
        content.add(data)
        if not content.is_whole():
            raise Altered(
                f"{file.path} does not match what its sender lists", hint=f"try again; {place.hint}"
            )
        digest = Digest.of(data)
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("wb") as out:
        out.write(data[:wanted])
        out.truncate(file.size)
    return FileEntry(path=file.path, size=file.size, digest=digest)


def _bytes(place: Place, file: RemoteFile, start: int, end: int) -> bytes:
    """Return a part of a file; fewer bytes if it ends, and one more if its sender has more."""
    data = bytearray()
    for chunk in place.read(file, start, end) if end > start else ():
        data += chunk
        if len(data) > end - start:
            break
    return bytes(data)


def _fetched(
    place: Place, source: str, store: Store, progress: Progress, folder: Path
) -> dict[str, JsonValue]:
    """Fill a result's folder; what a broken run left of it is there."""
    # In the result's own folder, which the store keeps for the next run if anything is in it.
    incoming = folder / INCOMING
    incoming.mkdir(exist_ok=True)
    if place.make:
        store.require_room(place.size, source)
        digests = place.make(incoming, progress)
    elif place.is_archive:
        (file,) = place.files
        store.require_room(2 * max(0, file.size), source)
        archive = incoming / "archive"

        def advance(at: int) -> None:
            progress.advance(at, max(file.size, at), "bytes")

        _download(place, file, archive, incoming / "part", advance, source, progress)
        remove(incoming / "model")
        (incoming / "model").mkdir()
        digests = extract(archive, incoming / "model", source, store.require_room)
    else:
        digests = _fetch_list(place, source, store, progress, folder, incoming)
    if (model := incoming / "model").is_dir():
        for path in model.iterdir():
            remove(folder / path.name)  # of a run that was killed here
            path.replace(folder / path.name)
    remove(incoming)
    return {"sha256": digests}


def _fetch_list(
    place: Place, source: str, store: Store, progress: Progress, folder: Path, incoming: Path
) -> dict[str, str]:
    files = chosen_files(place.files, source)
    _forget_another(list_pin(files), folder, incoming)
    total = sum(max(0, file.size) for file in files)
    store.require_room(total - sum(path.stat().st_size for path in below(folder)), source)
    digests: dict[str, str] = {}
    done, checked = 0, False
    for file in files:
        if not checked and file.path.endswith(WEIGHTS):
            check_no_code(folder, list(digests))
            checked = True
        target = folder / file.path
        target.parent.mkdir(parents=True, exist_ok=True)
        part = incoming / hashlib.sha256(file.path.encode()).hexdigest()

        def advance(at: int, done: int = done) -> None:
            progress.advance(done + at, max(total, done + at), "bytes")

        digests[file.path] = _download(place, file, target, part, advance, source, progress)
        done += target.stat().st_size
    return digests


def _forget_another(listed: str, folder: Path, incoming: Path) -> None:
    """Delete what a run fetched by another list: a place such as a run of MLflow may change."""
    note = incoming / "list"
    if note.is_file() and note.read_text() != listed:
        for path in [*folder.iterdir(), *incoming.iterdir()]:
            if path != incoming:
                remove(path)
    write_whole(note, listed.encode())


class _Content:
    """What has arrived of a file."""

    def __init__(self, file: RemoteFile) -> None:
        self._file = file
        self.size = 0
        self.sha256 = hashlib.sha256()
        only_md5 = file.md5 and not file.digest
        self._md5 = hashlib.md5(usedforsecurity=False) if only_md5 else None

    def add(self, chunk: bytes) -> None:
        self.size += len(chunk)
        self.sha256.update(chunk)
        if self._md5:
            self._md5.update(chunk)

    def is_whole(self) -> bool:
        """Return whether it is all that its sender says."""
        file = self._file
        if file.size >= 0 and self.size != file.size:
            return False
        if file.digest and self.sha256.hexdigest() != file.digest.hex:
            return False
        return self._md5 is None or self._md5.hexdigest() == file.md5


def _download(
    place: Place,
    file: RemoteFile,
    target: Path,
    part: Path,
    advance: Callable[[int], None],
    source: str,
    progress: Progress,
) -> str:
    """Fetch a file to `part`, and move it to `target` once it is whole; return its SHA-256."""
    is_whole = target.exists()
    if place.take and not is_whole:
        taken = part.with_suffix(".taken")
        remove(taken)
        found = place.take(file, taken)
        if not found.is_file():
            raise _altered(file, source)
        found.replace(part)
    here, content = target if is_whole else part, _Content(file)
    if here.exists():
        with here.open("rb") as held:
            while chunk := held.read(_CHUNK):
                content.add(chunk)
    if not (is_whole or place.take):
        try:
            _complete(place, file, part, content, advance, source, progress)
        except Altered:
            part.unlink()
            raise
    digest = content.sha256.hexdigest()
    if not content.is_whole():
        here.unlink()
        if place.pinned_bytes:
            raise InputRefused(
                f"{source} has the SHA-256 {digest}, which is not its pin",
                hint="it was deleted here. If the pin is its publisher's, the server has another "
                "file now, or a proxy changes it: find out which before you change the pin",
            )
        raise _altered(file, source)
    if not is_whole:
        part.replace(target)
    return digest


def _altered(file: RemoteFile, source: str) -> Altered:
    return Altered(
        f"{source}: {file.path} does not match what its sender lists",
        hint="it was deleted here: try again; if it happens again, a proxy or the sender changes "
        "the data: ask its administrator",
    )


def _complete(
    place: Place,
    file: RemoteFile,
    part: Path,
    content: _Content,
    advance: Callable[[int], None],
    source: str,
    progress: Progress,
) -> None:
    """Add to a file what it lacks, and try again where that breaks off."""
    failures, most = 0, file.size if file.size >= 0 else _LARGEST
    with part.open("ab") as out:
        while file.size < 0 or content.size < file.size:
            try:
                for chunk in place.read(file, content.size, -1):
                    content.add(chunk)
                    if content.size > most:
                        return  # more than its sender says
                    failures = 0
                    out.write(chunk)
                    advance(content.size)
                if content.size >= file.size:
                    break
                raise Broken("the connection ended early")
            except Broken as trouble:
                out.flush()
                failures += 1
                _pause(f"{source}: {file.path}: {trouble}", failures, place.hint, progress)
        out.flush()
        os.fsync(out.fileno())


def _pause(what: str, failures: int, hint: str, progress: Progress) -> None:
    if failures > len(_PAUSES):
        raise EnvironmentFailure(what, hint=f"{hint}; what has arrived is not fetched again")
    seconds = _PAUSES[failures - 1]
    progress.note(f"{what}; trying again in {seconds:g} s")
    time.sleep(seconds)
