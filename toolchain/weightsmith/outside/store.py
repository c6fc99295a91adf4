"""The content-addressed store: results are complete or absent, whatever kills the build.

results/<key>/data/…        the files of one finished result
results/<key>/manifest.json size and sha256 of each, the inputs, and the maker's metadata
partial/<key>/              in progress, under an exclusive lock; a resumable maker continues it
locks/<key>                 flock: exclusive while making or deleting, shared while in use
digests/, memos/            small caches that may be deleted at any time
"""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from hashlib import file_digest, sha256
from pathlib import Path

from weightsmith.core.errors import EnvironmentFailure
from weightsmith.core.files import age_order, sync_all, sync_folder, write_whole
from weightsmith.core.ports import Make, StoreEntry
from weightsmith.core.privacy import AnothersFolder, private
from weightsmith.core.safe_parse import parse
from weightsmith.core.trees import below, discard, give, remove
from weightsmith.core.values import (
    Digest,
    FileEntry,
    Json,
    Tree,
    UnreadDigest,
    Writable,
    canonical,
)
from weightsmith.core.waiting import kept_by_programs, take

_WORTH_REMEMBERING = 256 << 10
"""Bytes below which hashing a file again is cheaper than caching its digest."""
_MANY_FILES = 256
_PAUSE_SECONDS = 0.05
_DELETED = (
    "check whether another process deletes files in the store, or its disk was unmounted, or set "
    "WEIGHTSMITH_STORE to another folder; then build again"
)
_SETTLED_NS = 2_000_000_000
"""A younger file may still change within one mtime tick, so its digest is not cached."""


class FileStore:
    """A store in a local folder, shared by any number of concurrent builds."""

    def __init__(self, root: Path, tell: Callable[[str], None] | None = None) -> None:
        self.root = root
        self._tell = tell or (lambda _: None)
        """Called with a message when another process must be waited for."""
        self._held: dict[Digest, int] = {}
        """Open descriptors whose shared locks last as long as this process."""
        self._found: dict[Digest, StoreEntry] = {}
        """Entries in use, read once: nobody can delete them meanwhile."""
        self._holding = threading.Lock()
        """Two stages may look for the same entry at once."""

    def find(self, key: Digest) -> StoreEntry | None:
        """Return the entry, protected from deletion while this process lives, or None."""
        if key in self._found:
            return self._found[key]
        try:
            self._hold(key)
        except BlockingIOError:
            return None  # another process is making or deleting it
        except OSError:
            pass  # a read-only store can still be read
        entry = self._read(key, cached=True)
        if entry is None:
            self._release(key)
        elif key in self._held:
            self._found[key] = entry
        return entry

    def produce(
        self, key: Digest, note: Mapping[str, Writable], make: Make, *, resume: bool = False
    ) -> StoreEntry:
        """Return the entry; make it under the key's lock if it does not exist."""
        while True:
            if entry := self.find(key):
                return entry
            with self._writing("making a result"), self._try_exclusive(key.hex) as locked:
                if locked and self._read(key, cached=True) is None:
                    self._make(key, note, make, resume=resume)
                    break
            if not locked:
                self._wait(key, str(note.get("stage", "a stage")))
        self.find(key)  # takes the shared lock
        entry = self._read(key, cached=False)
        if entry is None:
            raise EnvironmentFailure(
                f"{self.root}: a result disappeared right after it was made",
                hint=_DELETED,
            )
        return entry

    def digest_file(self, path: Path, *, read: bool = True) -> FileEntry:
        """Return size and digest of a file; read again only if its inode or times have changed.

        Without `read` no large file is read: one that is not known has an UnreadDigest.
        """
        stat = path.stat()
        if stat.st_size < _WORTH_REMEMBERING:
            data = path.read_bytes()
            return FileEntry(path=path.name, size=len(data), digest=Digest.of(data))
        stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev]
        memo = self.root / "digests" / sha256(os.fsencode(path.resolve())).hexdigest()
        with suppress(OSError, ValueError, KeyError):
            known = parse(memo.read_bytes())
            if known["stamp"] == stamp:
                return FileEntry(path=path.name, size=stat.st_size, digest=Digest(known["digest"]))
        if not read:
            nobody = UnreadDigest.of(canonical(["not read", *stamp]))
            return FileEntry(path=path.name, size=stat.st_size, digest=nobody)
        with path.open("rb") as file:
            digest = Digest("sha256:" + file_digest(file, "sha256").hexdigest())
        if time.time_ns() - max(stat.st_mtime_ns, stat.st_ctime_ns) > _SETTLED_NS:
            with suppress(OSError):
                private(self.root, "digests")
                write_whole(memo, canonical({"stamp": stamp, "digest": digest}))
        return FileEntry(path=path.name, size=stat.st_size, digest=digest)

    def memo(self, key: str, make: Callable[[], str]) -> str:
        """Return the small text cached under a key; make and cache it if there is none."""
        path = self.root / "memos" / sha256(key.encode()).hexdigest()
        with suppress(OSError, ValueError):
            known = parse(path.read_bytes())
            if known[0] == key:
                return str(known[1])
        value = make()
        with suppress(OSError):
            private(self.root, "memos")
            write_whole(path, canonical([key, value]))
        return value

    def require_room(self, needed: int, what: str) -> None:
        """Raise EnvironmentFailure unless `needed` bytes are free on the store's disk."""
        with self._writing("looking for room"):
            private(self.root)
        free = shutil.disk_usage(self.root).free
        if free < needed:
            raise EnvironmentFailure(
                f"{what} needs {_gb(needed)} of disk, {self.root} has {_gb(free)} free",
                hint="free space (`invoke clean --keep 0` empties the store) or set "
                "WEIGHTSMITH_STORE to a folder on a larger disk",
            )

    def clean(self, keep_bytes: int) -> Mapping[str, int]:
        """Delete least recently used results above the budget, except those in use."""
        with self._writing("cleaning"):
            return self._clean(keep_bytes)

    def _clean(self, keep_bytes: int) -> Mapping[str, int]:
        results = sorted(self._results(), key=lambda item: age_order(item[1]))
        total = sum(size for _, _, size in results)
        before, deleted, busy = total, 0, 0
        for folder in _children(self.root / "partial"):
            with suppress(PermissionError), self._try_exclusive(folder.name) as locked:
                if locked:
                    discard(folder)
        for key, _, size in results:
            if total <= keep_bytes:
                break
            # In a shared store, another user's result stays; the others are still deleted.
            gone = False
            with suppress(PermissionError), self._try_exclusive(key) as locked:
                gone = locked and self._delete(key)
            total -= size if gone else 0
            deleted, busy = deleted + gone, busy + (not gone)
        return {"deleted": deleted, "in_use": busy, "bytes_before": before, "bytes_after": total}

    def _results(self) -> Iterator[tuple[str, float, int]]:
        for folder in _children(self.root / "results"):
            with suppress(OSError, ValueError, KeyError):
                manifest = parse((folder / "manifest.json").read_bytes())
                size = sum(int(file["size"]) for file in manifest["files"])
                yield folder.name, (folder / "manifest.json").stat().st_mtime, size

    def _delete(self, name: str) -> bool:
        # Renamed first: readers see a complete result or none, even if we are killed here.
        grave = private(self.root, "partial") / name
        discard(grave)
        (self.root / "results" / name).rename(grave)
        discard(grave)
        return True

    def _make(self, key: Digest, note: Mapping[str, Writable], make: Make, *, resume: bool) -> None:
        partial = private(self.root, "partial") / key.hex
        if not resume:
            remove(partial)
        data = partial / "data"
        data.mkdir(parents=True, exist_ok=True)
        if resume and os.geteuid() == 0:
            # A build that was killed never took it back from its container's user, and the next
            # job may run without a container, as root that can open root's own files alone.
            give(data, 0, os.getegid())
        # Opened before anything is written: what the system then fails to write, it tells us.
        with _opened(data) as handle:
            try:
                meta: dict[str, Json] = dict(make(data))
            except BaseException as problem:
                if not resume or isinstance(problem, OSError) or not below(data):
                    discard(partial)  # frees the space on a full disk; of nothing, nothing resumes
                raise
            files = self._seal(data, handle, meta.pop("sha256", {}))
        manifest = {"key": key, "note": note, "meta": meta, "files": files}
        write_whole(partial / "manifest.json", canonical(manifest))
        final = private(self.root, "results") / key.hex
        if final.exists():  # damaged, else we would not be here
            remove(final)
        partial.rename(final)
        sync_folder(final.parent)

    def _seal(self, data: Path, handle: int, known: Mapping[str, str]) -> list[FileEntry]:
        """Make every file durable and describe it; files with a known digest are not read again."""
        paths = [path for path in below(data) if path.is_file()]
        folders = [data, *(path for path in below(data) if path.is_dir())]
        for path in paths:
            path.chmod(0o755 if path.stat().st_mode & 0o100 else 0o644)
        for folder in folders:
            folder.chmod(0o755)
        # A sync of each file waits for the disk each time: 5 minutes for the files of vLLM's image.
        together = len(paths) > _MANY_FILES and sync_all(handle)
        files = []
        for path in paths:
            name = path.relative_to(data).as_posix()
            with path.open("rb") as file:
                if not together:
                    os.fsync(file.fileno())
                digest = known.get(name) or file_digest(file, "sha256").hexdigest()
                size = os.fstat(file.fileno()).st_size
            hexadecimal = digest.removeprefix("sha256:")
            files.append(FileEntry(path=name, size=size, digest=Digest("sha256:" + hexadecimal)))
        for folder in () if together else folders:
            sync_folder(folder)
        return files

    def _read(self, key: Digest, *, cached: bool) -> StoreEntry | None:
        folder = self.root / "results" / key.hex
        try:
            manifest = parse((folder / "manifest.json").read_bytes())
            files = tuple(
                FileEntry(path=f["path"], size=f["size"], digest=Digest(f["digest"]))
                for f in manifest["files"]
            )
            data = f"{folder}/data/"  # a string: a Path for each of 20,000 files is slow
            if any(os.stat(data + file.path).st_size != file.size for file in files):  # noqa: PTH116
                return None  # truncated by a disk crash: made again
        except (OSError, ValueError, KeyError, TypeError):
            return None
        with suppress(OSError):
            os.utime(folder / "manifest.json")
        return StoreEntry(
            tree=Tree(root=folder / "data", files=files),
            meta=manifest["meta"],
            cached=cached,
            note=manifest["note"],
        )

    def _hold(self, key: Digest) -> None:
        with self._holding:
            if key in self._held:
                return
            descriptor = self._open_lock(key.hex)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                raise
            self._held[key] = descriptor
            allow_more(descriptor)  # a fleet holds thousands of results

    def results(self) -> Iterator[tuple[Digest, Mapping[str, Writable], StoreEntry]]:
        """Yield the key, the note and the entry of every result, most recently used first."""
        for name, _, _ in sorted(
            self._results(), key=lambda item: age_order(item[1]), reverse=True
        ):
            with suppress(OSError, ValueError, KeyError):
                manifest = parse((self.root / "results" / name / "manifest.json").read_bytes())
                key = Digest(f"sha256:{name}")
                if manifest["key"] == key and (entry := self.find(key)):
                    yield key, manifest["note"], entry

    def close(self) -> None:
        """Release all entries; other processes may then delete them."""
        for key in list(self._held):
            self._release(key)

    def _release(self, key: Digest) -> None:
        self._found.pop(key, None)
        descriptor = self._held.pop(key, None)
        if descriptor is not None:
            os.close(descriptor)

    def _open_lock(self, name: str) -> int:
        path = private(self.root, "locks") / name
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)

    def _wait(self, key: Digest, stage: str) -> None:
        """Return when no process is making the result; it may still be in use."""
        with self._writing("waiting for a result"):
            descriptor = self._open_lock(key.hex)
            try:
                told = f"is making the same result of {stage}: waiting for it"
                take(
                    descriptor,
                    fcntl.LOCK_SH,
                    lambda who: self._tell(f"{who} {told} (in {self.root})"),
                )
            finally:
                os.close(descriptor)
            time.sleep(_PAUSE_SECONDS)  # a damaged result may be locked by a reader

    @contextmanager
    def _try_exclusive(self, name: str) -> Iterator[bool]:
        if Digest("sha256:" + name) in self._held:
            yield False
            return
        descriptor = self._open_lock(name)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            with kept_by_programs(descriptor):
                yield True
        finally:
            os.close(descriptor)

    @contextmanager
    def _writing(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._explain(error, what) from error

    def _explain(self, error: OSError, what: str) -> Exception:
        place = error.filename if isinstance(error.filename, str | Path) else self.root
        if not Path(place).is_relative_to(self.root):
            return error  # not in the store: the caller explains it
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return EnvironmentFailure(
                f"the disk is full while {what} ({place})",
                hint="nothing incomplete was left; free space (`invoke clean --keep 0` empties "
                "the store) or set WEIGHTSMITH_STORE to a folder on a larger disk",
            )
        if isinstance(error, AnothersFolder):
            return EnvironmentFailure(
                f"{place}: {error.strerror}",
                hint="set WEIGHTSMITH_STORE to a folder of your own",
            )
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            return EnvironmentFailure(
                f"cannot write to the store while {what}: {place}: {error.strerror}",
                hint="set WEIGHTSMITH_STORE to a writable folder",
            )
        if error.errno in (errno.ENOENT, errno.ESTALE):
            return EnvironmentFailure(
                f"a part of the store disappeared while {what}: {place}", hint=_DELETED
            )
        return error


@contextmanager
def _opened(folder: Path) -> Iterator[int]:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield handle
    finally:
        os.close(handle)


def _children(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if len(path.name) == 64]
    except FileNotFoundError:
        return []


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def allow_more(opened: int) -> None:
    """Raise this process's limit as far as it may once half of it is taken.

    `opened` is the latest descriptor. Most systems let a program open 1024 files unless it asks
    for more, since `select` knows no more; nothing here uses it.
    """
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if now < most and opened >= now // 2:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
