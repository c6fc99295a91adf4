"""A store that forgets: what FileStore promises, without its locks and its waiting for the disk."""

import errno
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from weightsmith.core.errors import EnvironmentFailure
from weightsmith.core.ports import StoreEntry
from weightsmith.core.values import Digest, FileEntry, Json, Tree, UnreadDigest, canonical

_LARGE = 256 << 10


@dataclass
class MemoryStore:
    """Entries in this process, their files below a folder; whole or absent."""

    root: Path
    entries: dict[Digest, StoreEntry] = field(default_factory=dict)
    """Least recently used first."""
    notes: dict[Digest, Mapping[str, Json]] = field(default_factory=dict)
    """What each was made of, as its maker says."""
    memos: dict[str, str] = field(default_factory=dict)
    free: int = 1 << 40
    """Bytes that the disk has left."""
    _begun: dict[Digest, str] = field(default_factory=dict)
    _held: set[Digest] = field(default_factory=set)
    _digests: dict[tuple[Path, int, int, int], Digest] = field(default_factory=dict)

    def made(self) -> list[str]:
        """Return the stages whose results are here, in the order in which they were made."""
        return [str(note.get("stage", "")) for note in self.notes.values()]

    def half(self) -> list[str]:
        """Return the stages whose results were begun, and are kept to go on with."""
        return [stage for key, stage in self._begun.items() if self._partial(key).exists()]

    def find(self, key: Digest) -> StoreEntry | None:
        entry = self.entries.get(key)
        if entry is None or not _is_whole(entry.tree):
            return None
        self.entries[key] = self.entries.pop(key)
        self._held.add(key)
        return replace(entry, cached=True)

    def produce(
        self,
        key: Digest,
        note: Mapping[str, Json],
        make: Callable[[Path], Mapping[str, Json]],
        *,
        resume: bool = False,
    ) -> StoreEntry:
        if found := self.find(key):
            return found
        partial = self._partial(key)
        self._begun[key] = str(note.get("stage", ""))
        try:
            if not resume:
                shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True, exist_ok=True)
            meta = dict(make(partial))
            tree = self._sealed(partial, key, meta.pop("sha256", {}))
        except OSError as problem:
            shutil.rmtree(partial, ignore_errors=True)  # gives a full disk its room back
            raise self._explained(problem) from None
        except BaseException:
            if not resume or not any(partial.iterdir()):
                shutil.rmtree(partial, ignore_errors=True)
            raise
        self.entries[key] = StoreEntry(tree=tree, meta=meta, cached=False, note=note)
        self.notes[key] = note
        self._held.add(key)
        return self.entries[key]

    def digest_file(self, path: Path, *, read: bool = True) -> FileEntry:
        stat = path.stat()
        stamp = (path.resolve(), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
        if stamp not in self._digests:
            if not read and stat.st_size >= _LARGE:
                nobody = UnreadDigest.of(canonical(["not read", *map(str, stamp)]))
                return FileEntry(path=path.name, size=stat.st_size, digest=nobody)
            self._digests[stamp] = Digest.of(path.read_bytes())
        return FileEntry(path=path.name, size=stat.st_size, digest=self._digests[stamp])

    def require_room(self, needed: int, what: str) -> None:
        if needed > self.free:
            raise EnvironmentFailure(
                f"{what} needs {needed} bytes of disk, {self.free} are free", hint="free some"
            )

    def memo(self, key: str, make: Callable[[], str]) -> str:
        if key not in self.memos:
            self.memos[key] = make()
        return self.memos[key]

    def clean(self, keep_bytes: int) -> Mapping[str, Json]:
        shutil.rmtree(self.root / "partial", ignore_errors=True)
        total = before = sum(entry.tree.size for entry in self.entries.values())
        deleted = busy = 0
        for key, entry in list(self.entries.items()):
            if total <= keep_bytes:
                break
            if key in self._held:
                busy += 1
                continue
            del self.entries[key], self.notes[key]
            shutil.rmtree(entry.tree.root)
            total -= entry.tree.size
            deleted += 1
        return {"deleted": deleted, "in_use": busy, "bytes_before": before, "bytes_after": total}

    def close(self) -> None:
        self._held.clear()

    def forget(self, *stages: str) -> None:
        for key in [key for key, note in self.notes.items() if note["stage"] in stages]:
            del self.entries[key], self.notes[key]

    def _partial(self, key: Digest) -> Path:
        return self.root / "partial" / key.hex

    def _sealed(self, partial: Path, key: Digest, known: Mapping[str, str]) -> Tree:
        files = []
        for path in sorted(path for path in partial.rglob("*") if path.is_file()):
            name = path.relative_to(partial).as_posix()
            path.chmod(0o755 if path.stat().st_mode & 0o100 else 0o644)
            given = known.get(name, "").removeprefix("sha256:")
            digest = Digest(f"sha256:{given}") if given else Digest.of(path.read_bytes())
            files.append(FileEntry(path=name, size=path.stat().st_size, digest=digest))
        final = self.root / "results" / key.hex
        shutil.rmtree(final, ignore_errors=True)  # there, but damaged or forgotten
        final.parent.mkdir(exist_ok=True)
        partial.rename(final)
        return Tree(root=final, files=tuple(files))

    def _explained(self, problem: OSError) -> Exception:
        if not Path(str(problem.filename)).is_relative_to(self.root):
            return problem
        full = problem.errno in (errno.ENOSPC, errno.EDQUOT)
        what = "the disk is full" if full else "cannot write to the store"
        return EnvironmentFailure(f"{what}: {problem}", hint="free some, or use another folder")


def _is_whole(tree: Tree) -> bool:
    try:
        return all(tree.path(file.path).stat().st_size == file.size for file in tree.files)
    except OSError:
        return False
