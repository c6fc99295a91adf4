"""Checkpoint files without data, which is computed when it is read.

Such a file is the header of the file that it stands for: names, types, shapes and offsets are
right. A job says what computes the data (`filled`) before anything reads them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from weightsmith.core.errors import InputRefused
from weightsmith.core.values import FileEntry, Tree
from weightsmith.models.safetensors import NO_DATA, SafetensorsHeader

if TYPE_CHECKING:
    import numpy as np


class Data(Protocol):
    """Computes what a file would hold."""

    def read(self, start: int, size: int) -> np.ndarray:
        """Return bytes of tensors by their offset in the file: uint8 [size]; thread-safe."""


_FILLED: dict[Path, Data] = {}
"""By the file's real path. A job has one such checkpoint, and many places read it."""


@contextmanager
def filled(files: Mapping[Path, Data]) -> Iterator[None]:
    """Let readers compute the data of these files while the block runs."""
    known = {path.resolve(): data for path, data in files.items()}
    _FILLED.update(known)
    try:
        yield
    finally:
        for path in known:
            _FILLED.pop(path)


def has_no_data(header: SafetensorsHeader) -> bool:
    """Return whether a file has no data of its own."""
    return header.metadata == NO_DATA


def data_of(header: SafetensorsHeader) -> Data | None:
    """Return what computes a file's data; None for a file that has it.

    Raises InputRefused if nothing does.
    """
    if not has_no_data(header):
        return None
    if (found := _FILLED.get(header.path.resolve())) is None:
        raise InputRefused(
            f"{header.path} has no data: its weights are computed from base and adapters",
            hint="merge again to write them (`weightsmith merge`)",
        )
    return found


def computed(path: Path) -> Data | None:
    """Return what computes the data of a file whose header was read before, or None."""
    return _FILLED.get(path.resolve()) if _FILLED else None


class HeaderOnlyTree(Tree):
    """A tree of files that were not written; headers and small files are those of another tree."""

    __slots__ = ("_there",)
    _there: Tree

    def __init__(self, files: tuple[FileEntry, ...], there: Tree) -> None:
        object.__setattr__(self, "_there", there)
        object.__setattr__(self, "files", files)
        object.__setattr__(self, "places", {})

    def __repr__(self) -> str:
        """Return a text without the other tree, which may be fetched where it is used."""
        return f"UnwrittenTree({len(self.files)} files)"

    @property
    def root(self) -> Path:
        """The folder of the other tree."""
        return self._there.root

    @property
    def texts(self) -> Path:
        """A folder with all files but the weights."""
        return self._there.texts

    def path(self, name: str) -> Path:
        """Return the location of a file; of weights, that of their header."""
        return self._there.path(name)
