"""Files of one tree beside those of another, of which none is fetched for that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from weightsmith.core.values import Stream, Tree


class BesideTree(Tree):
    """A tree's files, and some of another's under names of their own; `root` is the first's."""

    __slots__ = ("_names", "_other", "_tree")
    _tree: Tree
    _other: Tree
    _names: Mapping[str, str]

    def __init__(self, tree: Tree, other: Tree, names: Mapping[str, str]) -> None:
        """Join them; `names` are the other's files: path here -> path there."""
        there = {file.path: file for file in other.files}
        files = [*tree.files, *(replace(there[path], path=name) for name, path in names.items())]
        object.__setattr__(self, "_tree", tree)
        object.__setattr__(self, "_other", other)
        object.__setattr__(self, "_names", names)
        object.__setattr__(self, "files", tuple(sorted(files, key=lambda one: one.path)))
        object.__setattr__(self, "places", {})

    def __repr__(self) -> str:
        """Return a text without fetching anything."""
        return f"BesideTree({len(self.files)} files)"

    def _of(self, name: str) -> tuple[Tree, str]:
        there = self._names.get(name)
        return (self._other, there) if there else (self._tree, name)

    @property
    def root(self) -> Path:
        """The first tree's folder."""
        return self._tree.root

    @property
    def texts(self) -> Path:
        """The first tree's."""
        return self._tree.texts

    def path(self, name: str) -> Path:
        """Return the file's location on disk."""
        tree, there = self._of(name)
        return tree.path(there)

    def source(self, name: str) -> Path | Stream:
        """Return where the file's bytes come from, without fetching them."""
        tree, there = self._of(name)
        return tree.source(there)

    def header(self, name: str) -> Path:
        """Return a file with the weights file's header and size."""
        tree, there = self._of(name)
        return tree.header(there)

    def mode(self, name: str) -> int:
        """Return the file's mode."""
        tree, there = self._of(name)
        return tree.mode(there)
