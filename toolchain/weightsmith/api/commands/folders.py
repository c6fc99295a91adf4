"""Open a user's folders as the values that stages take, without reading large files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from weightsmith.core.ports import Store
from weightsmith.core.values import AdapterSnapshot, Checkpoint, FileEntry, Snapshot, Sources, Tree
from weightsmith.models.folder import check_adapter_folder, check_model_folder
from weightsmith.recipe.schema import Base
from weightsmith.stages.resolve import resolve_base
from weightsmith.steps.tools import Tools


def open_sources(
    base: Path, adapters: Sequence[Path], weights: Sequence[float], store: Store
) -> Sources:
    """Return a base and adapters in order; raise InputRefused if a folder is not safe to read."""
    return Sources(
        base=_snapshot(base, check_model_folder(base), store),
        adapters=tuple(
            AdapterSnapshot(
                snapshot=_snapshot(folder, check_adapter_folder(folder), store), weight=weight
            )
            for folder, weight in zip(adapters, weights, strict=True)
        ),
    )


def base_folder(base: str, tools: Tools) -> Path:
    """Return a base's folder; one of a hub or an index is fetched first."""
    if "://" not in base:
        return Path(base)
    return resolve_base(Base(source=base), Path(), tools).tree.root


def open_checkpoint(folder: Path, store: Store) -> Checkpoint:
    """Return a checkpoint; raise InputRefused if the folder is not one or is not safe to read."""
    return Checkpoint(tree=_tree(folder, check_model_folder(folder), store))


def _snapshot(folder: Path, names: Sequence[str], store: Store) -> Snapshot:
    tree = _tree(folder, names, store)
    return Snapshot(tree=tree, source=str(folder), pin="", pinned=False)


def _tree(folder: Path, names: Sequence[str], store: Store) -> Tree:
    """Return the files; large ones may have a placeholder instead of a digest."""
    root = folder.resolve()
    entries = ((name, store.digest_file(root / name, read=False)) for name in names)
    files = [FileEntry(path=name, size=entry.size, digest=entry.digest) for name, entry in entries]
    return Tree(root=root, files=tuple(files))
