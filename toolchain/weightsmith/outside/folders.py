"""Reads a source from a local folder, or from a GGUF file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from weightsmith.core.errors import InputRefused
from weightsmith.core.ports import Progress, Silent, Store
from weightsmith.core.values import Snapshot, Tree
from weightsmith.models.folder import scan
from weightsmith.models.reshard import HASHED_AT_ONCE
from weightsmith.recipe.sources import SCHEMES

_SOON = 2 << 30
"""Bytes; a smaller folder is hashed to predict what is cached, in about two seconds."""


class FolderReader:
    """Uses a local folder or GGUF file in place: every file is hashed, nothing is copied."""

    scheme = ""

    def __init__(self, store: Store) -> None:
        self._store = store

    def check(self, source: str) -> None:
        """Do nothing: what reads it is always installed."""

    def fetch(self, source: str, revision: str, sha256: str, progress: Progress) -> Snapshot:
        """Return the folder's safe files, or the GGUF file; InputRefused if missing or unsafe."""
        return self._snapshot(source, revision, sha256, progress, read=True)

    def known(self, source: str, revision: str, sha256: str) -> Snapshot | None:
        """Return the folder, which is always available.

        Large files without a cached digest get a placeholder, which no result was made from.
        """
        return self._snapshot(source, revision, sha256, Silent(), read=False)

    def glance(
        self, source: str, revision: str, sha256: str, progress: Progress
    ) -> Snapshot | None:
        """Return None: a folder is always here."""
        del source, revision, sha256, progress
        return None

    def _snapshot(
        self, source: str, revision: str, sha256: str, progress: Progress, *, read: bool
    ) -> Snapshot:
        root, file = Path(source), ""
        if root.suffix == ".gguf" and root.is_file():
            root, file = root.parent, root.name
        if not root.is_dir():
            what = "is a file, not a folder" if root.exists() else "does not exist"
            raise InputRefused(
                f"{source} {what}",
                hint="a source is a folder, for a base also a .gguf file, or begins with one of: "
                f"{', '.join(SCHEMES)}",
            )
        if revision or sha256:
            raise InputRefused(
                f"{source}: what is local has no revision or sha256 to pin",
                hint="leave `revision` and `sha256` out; it is pinned by its content",
            )
        names = [file] if file else scan(root)
        soon = read or sum((root / name).stat().st_size for name in names) <= _SOON
        tree = _hashed(root, names, self._store, progress, read=soon)
        return Snapshot(tree=tree, source=source, pin=str(tree.digest), pinned=True)


def read_tree(
    root: Path,
    store: Store,
    progress: Progress,
    *,
    read: bool = True,
    wanted: Callable[[str], bool] = lambda _: True,
) -> Tree:
    """Return the safe files of a folder with their digests; see Store.digest_file for `read`."""
    return _hashed(root, [n for n in scan(root) if wanted(n)], store, progress, read=read)


def _hashed(
    root: Path, names: Sequence[str], store: Store, progress: Progress, *, read: bool
) -> Tree:
    sizes = [(root / name).stat().st_size for name in names]
    total, done, files = sum(sizes), 0, []
    with ThreadPoolExecutor(HASHED_AT_ONCE) as pool:
        entries = pool.map(lambda name: store.digest_file(root / name, read=read), names)
        for name, size, entry in zip(names, sizes, entries, strict=True):
            files.append(replace(entry, path=name))
            done += size
            progress.advance(done, total, "bytes")
    return Tree(root=root, files=tuple(files))
