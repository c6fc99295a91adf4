"""Reads a source that is a folder of this machine."""

from __future__ import annotations

from pathlib import Path

from toolchain.checkpoints.folder import scan
from toolchain.errors import InputRefused
from toolchain.ports import Progress, Silent, Store
from toolchain.values import FileEntry, Snapshot, Tree


class FolderReader:
    """Brings a local folder as it is: nothing is copied, every file is hashed."""

    scheme = ""

    def __init__(self, store: Store) -> None:
        self._store = store

    def fetch(self, source: str, revision: str, sha256: str, progress: Progress) -> Snapshot:
        """Return the folder's safe files by digest; InputRefused where it is missing or unsafe."""
        root = Path(source)
        if not root.is_dir():
            what = "is a file, not a folder" if root.exists() else "does not exist"
            raise InputRefused(
                f"{source} {what}",
                hint="a source is a folder, hf://owner/name or pypi://package==version",
            )
        if revision or sha256:
            raise InputRefused(
                f"{source}: a folder has no revision or sha256 to pin",
                hint="leave `revision` and `sha256` out; a folder is pinned by its content",
            )
        tree = read_tree(root, self._store, progress)
        return Snapshot(tree=tree, source=source, pin=str(tree.digest), pinned=True)

    def known(self, source: str, revision: str, sha256: str) -> Snapshot | None:
        """Return the folder: it is always here."""
        return self.fetch(source, revision, sha256, Silent())


def read_tree(root: Path, store: Store, progress: Progress) -> Tree:
    """Return the safe files of a folder with their digests."""
    names = scan(root)
    sizes = [(root / name).stat().st_size for name in names]
    total, done, files = sum(sizes), 0, []
    for name, size in zip(names, sizes, strict=True):
        entry = store.digest_file(root / name)
        files.append(FileEntry(path=name, size=entry.size, digest=entry.digest))
        done += size
        progress.advance(done, total, "bytes")
    return Tree(root=root, files=tuple(files))
