"""Where a stage's result goes: the store, or a folder that the user names."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from weightsmith.errors import CheckFailed, InputRefused, UsageError
from weightsmith.files import alone, sync_folder
from weightsmith.ports import Store
from weightsmith.tools import Tools
from weightsmith.trees import below, discard
from weightsmith.values import FileEntry, Json, StageInputs, Tree

Make = Callable[[Path], Mapping[str, Json]]
"""Fills an empty folder and returns what is to be remembered beside the files."""
Inputs = Callable[[], StageInputs]
"""Works out a store key; a folder of the user's has none, so nothing is hashed for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Files:
    """A stage's files, and what their maker said of them."""

    tree: Tree
    meta: Mapping[str, Json]
    cached: bool
    """True if they were there before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A stage's result that is one JSON document."""

    value: Json
    cached: bool


class Destination(Protocol):
    """Keeps what a stage makes; a stage does not know where."""

    def files(self, inputs: Inputs, make: Make, *, resume: bool = False) -> Files:
        """Return the files, made by `make(folder)` unless they are there.

        With `resume`, `make` finds what an interrupted run left in the folder.
        """

    def document(self, inputs: Inputs, name: str, make: Make) -> Document:
        """Return the JSON that `make(folder)` returns; a store keeps it as a file `name`."""


@dataclass(frozen=True, slots=True)
class InStore:
    """Keeps results in the store, by their inputs."""

    store: Store

    def files(self, inputs: Inputs, make: Make, *, resume: bool = False) -> Files:
        """Return the store's entry, made if it is not there."""
        stage = inputs()
        note = {"stage": stage.stage, "inputs": stage.inputs}
        entry = self.store.find(stage.key) or self.store.produce(
            stage.key, note, make, resume=resume
        )
        return Files(tree=entry.tree, meta=entry.meta, cached=entry.cached)

    def document(self, inputs: Inputs, name: str, make: Make) -> Document:
        """Return the document of the store's entry, made if it is not there."""

        def written(folder: Path) -> Mapping[str, Json]:
            text = json.dumps(make(folder), ensure_ascii=False)
            (folder / name).write_text(text, "utf-8")
            return {}

        files = self.files(inputs, written)
        value = json.loads(files.tree.path(name).read_text("utf-8"))
        return Document(value=value, cached=files.cached)


@dataclass(frozen=True, slots=True)
class Unkept:
    """Runs a stage whose result is a document, and keeps no file of it."""

    tools: Tools

    def document(self, _inputs: Inputs, _name: str, make: Make) -> Document:
        """Return the document, made in a folder that is deleted afterwards."""
        with self.tools.scratch() as folder:
            return Document(value=make(folder), cached=False)


@dataclass(frozen=True, slots=True)
class InFolder(Unkept):
    """Puts files into a folder; made by `in_folder`, which gives the folder its name."""

    folder: Path

    def files(self, _inputs: Inputs, make: Make, *, resume: bool = False) -> Files:
        """Return the files, made in the folder; what an interrupted run left is used or deleted."""
        if not resume:
            for path in self.folder.iterdir():
                discard(path)
        meta = dict(make(self.folder))
        return Files(tree=folder_tree(self.folder, self.tools.store), meta=meta, cached=False)


@contextmanager
def in_folder(out: Path, what: str, tools: Tools) -> Iterator[InFolder]:
    """Yield a destination whose files appear at `out`, all at once, when the block ends well.

    A single file gets the name `out` itself if the suffixes agree. An interrupted run is resumed
    by the next one; nothing is left of a refused one. Raises UsageError if `out` is in use or
    another process is writing it.
    """
    out = _unused(out, what)
    partial = out.with_name(f".{out.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    with _locked(partial, out):
        try:
            yield InFolder(tools, partial)
        except (CheckFailed, InputRefused):
            discard(partial)
            raise
        _rename(partial, out)


def folder_tree(root: Path, store: Store) -> Tree:
    """Return a folder's files without reading large ones: their digests may be placeholders."""
    names = sorted(str(path.relative_to(root)) for path in below(root) if path.is_file())
    entries = ((name, store.digest_file(root / name, read=False)) for name in names)
    files = [FileEntry(path=name, size=entry.size, digest=entry.digest) for name, entry in entries]
    return Tree(root=root, files=tuple(files))


def _unused(path: Path, what: str) -> Path:
    """Return the path, absolute; UsageError if something is there already."""
    path = path.absolute()
    if path.is_symlink():  # by its own name it could not be replaced
        path = path.resolve()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UsageError(f"{path} exists already", hint=f"name a new place for {what}")
    return path


@contextmanager
def _locked(partial: Path, out: Path) -> Iterator[None]:
    with ExitStack() as stack:
        try:
            stack.enter_context(alone(partial, wait=False))
        except (BlockingIOError, FileNotFoundError):
            raise UsageError(
                f"another process is writing {out}", hint="wait for it, or name another place"
            ) from None
        yield


def _rename(partial: Path, out: Path) -> None:
    """Give the result its name: the one file that `out` names, or the folder."""
    files = [path for path in below(partial) if path.is_file()]
    if out.exists():
        out.rmdir()  # it is empty
    if len(files) == 1 and out.suffix and out.suffix == files[0].suffix:
        files[0].rename(out)
        discard(partial)
    else:
        partial.rename(out)
    sync_folder(out.parent)
