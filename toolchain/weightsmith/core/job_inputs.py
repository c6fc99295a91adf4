"""What jobs read: files and folders by content, and what computes weights that no file has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

from weightsmith.core.merge_options import Merge
from weightsmith.core.values import Checkpoint, FileEntry, Tree, UnreadDigest


@dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """A file or folder that a job reads: its path, and its content if known."""

    path: Path
    files: tuple[FileEntry, ...] | None = None
    """Its files by path relative to `path` (`.` for `path` itself); None if any has no digest."""

    def at(self, path: Path) -> Self:
        """Return the same content at another path."""
        return replace(self, path=path)

    @classmethod
    def tree(cls, tree: Tree) -> Self:
        """Return a folder as an input; all its files must be inside its root."""
        unread = any(isinstance(entry.digest, UnreadDigest) for entry in tree.files)
        return cls(path=tree.root, files=None if unread else tree.files)

    @classmethod
    def checkpoint(cls, checkpoint: Checkpoint) -> Self:
        """Return the files of a checkpoint that are there as an input."""
        return cls.tree(checkpoint.computed.tree if checkpoint.computed else checkpoint.tree)

    @classmethod
    def file(cls, tree: Tree, name: str) -> Self:
        """Return one file of a tree as an input."""
        (entry,) = (entry for entry in tree.files if entry.path == name)
        return cls(path=tree.path(name), files=(replace(entry, path="."),))


@dataclass(frozen=True, slots=True, kw_only=True)
class Virtual:
    """What computes the weights of an input whose files have none."""

    base: Input
    adapters: tuple[Input, ...]
    weights: tuple[float, ...]
    """One per adapter."""
    options: Merge
    digests: Mapping[str, str] = field(default_factory=dict)
    """File -> sha256 in hex of what the merge computed."""
    largest: Mapping[str, float] = field(default_factory=dict)
    """Matrix -> its largest magnitude, where the merge has recorded it."""

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Self | None:
        """Return what computes a checkpoint's weights; None if they are in its files."""
        if (computed := checkpoint.computed) is None:
            return None
        adapters = computed.sources.adapters
        return cls(
            base=Input.tree(computed.sources.base.tree),
            adapters=tuple(Input.tree(adapter.snapshot.tree) for adapter in adapters),
            weights=tuple(adapter.weight for adapter in adapters),
            options=Merge(**computed.merge),
            digests={
                file.path: str(file.digest).removeprefix("sha256:")
                for file in checkpoint.tree.files
                if file.path.endswith(".safetensors")
            },
            largest=computed.largest,
        )

    @property
    def weighted(self) -> tuple[tuple[Path, float], ...]:
        """Each adapter's folder and weight, in order."""
        paths = (given.path for given in self.adapters)
        return tuple(zip(paths, self.weights, strict=True))

    @property
    def inputs(self) -> Mapping[str, Input]:
        """Its inputs by name."""
        numbered = {f"virtual_adapter{n}": given for n, given in enumerate(self.adapters)}
        return {"virtual_base": self.base, **numbered}

    def at(self, inputs: Mapping[str, Input]) -> Self:
        """Return the same with the inputs at other paths."""
        adapters = tuple(inputs[f"virtual_adapter{n}"] for n in range(len(self.adapters)))
        return replace(self, base=inputs["virtual_base"], adapters=adapters)
