"""Where a stage's result goes: the store, a folder that the user names, or a target's results."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from weightsmith.core.errors import CheckFailed, EnvironmentFailure, InputRefused, UsageError
from weightsmith.core.files import folder_lock, sync_folder, write_folder
from weightsmith.core.ports import Make, Store, StoreEntry
from weightsmith.core.trees import below, discard
from weightsmith.core.values import Digest, FileEntry, Json, JsonValue, StageInputs, Tree
from weightsmith.core.waiting import holder
from weightsmith.evaluating.build_record import read_build
from weightsmith.steps.tools import Tools

MakeDocument = Callable[[Path], JsonValue]
"""Returns the document; the folder is for temporary files."""
Inputs = Callable[[], StageInputs]
"""Computes a store key; not called for a user's folder, which has none."""


def moved(made: Path, facts: Mapping[str, JsonValue]) -> Make:
    """Return what stores the files of a folder that another result was made in."""

    def move(folder: Path) -> Mapping[str, JsonValue]:
        for path in made.iterdir():
            path.rename(folder / path.name)
        return facts

    return move


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredDocument:
    """A stage's result that is one JSON document."""

    value: Json
    cached: bool


@dataclass(frozen=True, slots=True)
class InStore:
    """Saves results in the store, with their inputs as the key."""

    store: Store

    def files(self, inputs: Inputs, make: Make, *, resume: bool = False) -> StoreEntry:
        """Return the files; call `make(folder)` if they do not exist.

        With `resume`, the folder has the files that an interrupted run left.
        """
        stage = inputs()
        return self.store.produce(stage.key, stage.note, make, resume=resume)

    def document(
        self, inputs: Inputs, name: str, make: MakeDocument, *, resume: bool = False
    ) -> StoredDocument:
        """Return the JSON from `make(folder)`, which the store saves as the file `name`.

        With `resume`, the folder has the temporary files that an interrupted run left, if any.
        """

        def written(folder: Path) -> Mapping[str, JsonValue]:
            text = json.dumps(make(folder), ensure_ascii=False)
            for path in list(folder.iterdir()):
                discard(path)
            (folder / name).write_text(text, "utf-8")
            return {}

        files = self.files(inputs, written, resume=resume)
        value = json.loads(files.tree.path(name).read_text("utf-8"))
        return StoredDocument(value=value, cached=files.cached)

    def find(self, inputs: Inputs) -> Tree | None:
        """Return the entry's files, or None."""
        entry = self.store.find(inputs().key)
        return entry.tree if entry else None

    def keep(self, inputs: Inputs, file: Path) -> None:
        """Store a copy of the file as a separate entry."""

        def copied(folder: Path) -> Mapping[str, JsonValue]:
            shutil.copyfile(file, folder / file.name)
            return {}

        self.files(inputs, copied)


@dataclass(frozen=True, slots=True)
class Unkept:
    """Runs a stage whose result is a document, without storing any file."""

    tools: Tools

    def document(
        self, _inputs: Inputs, _name: str, make: MakeDocument, *, resume: bool = False
    ) -> StoredDocument:
        """Return the document, made in a temporary folder of which nothing stays."""
        del resume
        with self.tools.scratch() as folder:
            return StoredDocument(value=make(folder), cached=False)

    def find(self, _inputs: Inputs) -> Tree | None:
        """Return None: nothing is stored."""
        return None


@dataclass(frozen=True, slots=True)
class InFolder(Unkept):
    """Writes files to a folder; `in_folder` creates it and renames the folder."""

    folder: Path
    resumes: bool

    def files(self, _inputs: Inputs, make: Make, *, resume: bool = False) -> StoreEntry:
        """Return the files, made in the folder.

        The folder has no key that says what an interrupted run was making: unless `resumes`, what
        it left is deleted, whatever the stage could do with it.
        """
        if not (resume and self.resumes):
            for path in self.folder.iterdir():
                discard(path)
        meta: dict[str, Json] = dict(make(self.folder))
        known: Mapping[str, str] = meta.pop("sha256", {})  # of large files
        files = (path for path in below(self.folder) if path.is_file())
        entries = []
        for name in sorted(str(path.relative_to(self.folder)) for path in files):
            found = self.tools.store.digest_file(self.folder / name, read=False)
            digest = Digest(f"sha256:{known[name]}") if name in known else found.digest
            entries.append(FileEntry(path=name, size=found.size, digest=digest))
        tree = Tree(root=self.folder, files=tuple(entries))
        return StoreEntry(tree=tree, meta=meta, cached=False)

    def keep(self, _inputs: Inputs, _file: Path) -> None:
        """Do nothing: by-products are not stored."""


Documents = InStore | Unkept
"""Where a stage's result goes that is one JSON document; the stage does not know."""
Destination = InStore | InFolder
"""The same of files."""


@contextmanager
def in_folder(out: Path, what: str, tools: Tools, *, resumes: bool = False) -> Iterator[InFolder]:
    """Yield a destination whose files appear atomically at `out` when the block succeeds.

    A single file gets the name `out` itself if the suffixes agree; so does one of that name, and
    the files with it get their places beside it. Nothing is left if the block fails; with
    `resumes`, an interrupted run is left for the next one to resume. Raises UsageError if `out` is
    in use or another process is writing it.
    """
    out = out.absolute()
    if out.is_symlink():  # a link cannot be replaced by a rename
        out = out.resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} already exists", hint=f"give a new path for {what}")
    partial = out.with_name(f".{out.name}.partial")
    try:
        partial.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise UsageError(f"{partial} is not a folder", hint="delete it") from None
    except FileNotFoundError as error:  # as in /proc, which makes no folders
        raise EnvironmentFailure(
            f"cannot make {partial}: {error.strerror}",
            hint=f"give a path for {what} where folders can be made",
        ) from None
    with ExitStack() as stack:
        try:
            stack.enter_context(folder_lock(partial, wait=False))
        except (BlockingIOError, FileNotFoundError):
            raise UsageError(
                f"{holder(partial)} is writing {out}", hint="wait for it, or give another path"
            ) from None
        try:
            yield InFolder(tools, partial, resumes)
        except BaseException as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                # A write to an open file does not say where it was.
                error.filename = error.filename or str(out)
            if not resumes or isinstance(error, CheckFailed | InputRefused | UsageError):
                discard(partial)
            raise
        _rename(partial, out)


def _rename(partial: Path, out: Path) -> None:
    """Rename the result to `out`: its only file, its file of that name, or the folder.

    Other files beside one of that name come first: without it, the result is not there.
    """
    main = main_file(partial, out)
    try:
        if out.exists():
            out.rmdir()  # it is empty
        for path in _files(partial) if main else ():
            if path != main:
                path.rename(out.with_name(path.name))
        (main or partial).rename(out)
    except OSError as error:
        raise UsageError(
            f"the result cannot be put at {out}: {error.strerror}",
            hint=f"it is in {partial}: move it to another place",
        ) from None
    if main:
        discard(partial)
    sync_folder(out.parent)


def main_file(partial: Path, out: Path) -> Path | None:
    """Return the file of a result that becomes `out` itself; None if its folder does."""
    files = _files(partial)
    alike = bool(out.suffix) and all(path.suffix == out.suffix for path in files)
    named = (path for path in files if alike and (len(files) == 1 or path.name == out.name))
    return next(named, None)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in below(folder) if path.is_file())


def is_written(files: Mapping[str, str], folder: Path) -> bool:
    """Return whether a folder already has these texts from an earlier build."""
    try:
        return all((folder / name).read_text("utf-8") == text for name, text in files.items())
    except (OSError, ValueError):
        return False


def layers_in(folder: Path) -> tuple[str, ...]:
    """Return the layers of the image recorded in a folder, bottom first; () if there is none."""
    try:
        image = read_build(folder).image
    except (OSError, ValueError):
        return ()
    return tuple(layer.digest for layer in image.layers) if image else ()


def write_files(files: Mapping[str, str], folder: Path) -> None:
    """Write texts to a folder, each atomically.

    Raises UsageError if it is a file, EnvironmentFailure if it cannot be written.
    """
    try:
        write_folder(folder, {name: text.encode() for name, text in files.items()})
    except FileExistsError as error:
        raise UsageError(
            f"cannot write results to {folder}: {error.filename or folder} is not a folder",
            hint="give another path, or move that file away",
        ) from None
    except OSError as error:
        raise EnvironmentFailure(
            f"cannot write results to {folder}: {error.strerror}",
            hint="check the folder's permissions and the free space on its disk",
        ) from None
