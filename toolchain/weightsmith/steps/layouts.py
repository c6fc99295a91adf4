"""Writes an image layout next to its final path, then moves it there atomically.

A layout takes the place of another by swapping names (`renameat2`), or by two renames, which the
next build mends if the process was killed between them.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from weightsmith.core.errors import EnvironmentFailure, UsageError
from weightsmith.core.files import exchange, folder_lock, is_unfinished
from weightsmith.core.trees import discard
from weightsmith.core.waiting import holder
from weightsmith.oci.image import ImageOrIndex, Index, images_of
from weightsmith.oci.layout import (
    DEFAULT_NAME,
    PARTS,
    forget,
    held_digest,
    image_names,
    write_index,
    write_layout,
)
from weightsmith.serving.memory import human
from weightsmith.steps.tools import Tools


@contextmanager
def candidate_layout(whole: ImageOrIndex, folder: Path, tools: Tools) -> Iterator[Path]:
    """Write an image's layout next to its final path; yield the folder.

    If the block fails, nothing is left; what an interrupt leaves is used by the next run.
    """
    with _locked_folder(_candidate(_real(folder)), tools) as candidate, _nothing_left(candidate):
        _write(whole, candidate, tools)
        yield candidate


def discard_candidate_layout(folder: Path, tools: Tools) -> None:
    """Delete the candidate layout next to the final path, if there is one."""
    folder = _real(folder)
    if _candidate(folder).exists():
        with _locked_folder(_candidate(folder), tools) as candidate:
            discard(candidate)


@contextmanager
def final_layout(whole: ImageOrIndex, folder: Path, tools: Tools) -> Iterator[Path]:
    """Yield the complete candidate layout; move it to its final path afterwards.

    If the block fails, nothing is left; what an interrupt leaves is used by the next run.
    """
    folder = _real(folder)
    with _locked_folder(_candidate(folder), tools) as candidate, _nothing_left(candidate):
        stale = held_digest(candidate)
        _write(whole, candidate, tools)
        if stale is not None and stale != whole.digest:
            _forget_unnamed(candidate, whole)
        yield candidate
        with _explained(folder):
            _take_place(candidate, folder)


def _take_place(candidate: Path, folder: Path) -> None:
    """Rename a layout to its final path, so that a layout exists there at every moment.

    A file system that cannot swap names needs two renames. `_recover` completes them if the
    process was killed in between.
    """
    old = _old(folder)
    if not folder.exists():
        candidate.rename(folder)
        discard(old)
        return
    discard(old)
    with folder_lock(folder):  # it briefly has the candidate's name, so lock it
        if exchange(candidate, folder):
            candidate.rename(old)
        else:
            folder.rename(old)
            candidate.rename(folder)
        discard(old)


def _recover(folder: Path) -> None:
    """Restore the layout that a killed build was replacing.

    Raises EnvironmentFailure if it cannot be renamed.
    """
    old = _old(folder)
    if folder.exists() or not old.exists():
        return
    with _locked_folder(_candidate(folder)) as candidate:
        with _explained(folder):
            if old.exists() and not folder.exists():  # no other process restored it
                old.rename(folder)
        with suppress(OSError):
            candidate.rmdir()  # if this call created it


@contextmanager
def _locked_folder(folder: Path, tools: Tools | None = None) -> Iterator[Path]:
    """Yield a locked folder: no other build writes to it or renames it until the block ends.

    Raises EnvironmentFailure if it cannot be made.
    """
    wait = False
    with ExitStack() as stack:
        with _explained(folder):
            while True:
                folder.mkdir(parents=True, exist_ok=True)
                try:
                    stack.enter_context(folder_lock(folder, wait=wait))
                    break
                except FileNotFoundError:
                    continue  # renamed between open and lock
                except BlockingIOError:
                    wait = True
                    if tools is not None:
                        tools.progress.note(
                            f"the layout {folder} is in use by {holder(folder)}: waiting for it"
                        )
        yield folder


@contextmanager
def _nothing_left(candidate: Path) -> Iterator[None]:
    """Delete a candidate, which may be as large as the model, if the block fails."""
    try:
        yield
    except Exception:
        discard(candidate)
        raise


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise EnvironmentFailure(
            f"cannot write the image layout {folder}: {error.strerror}",
            hint="check free space and permissions, then run the command again",
        ) from None


def _forget_unnamed(folder: Path, whole: ImageOrIndex) -> None:
    """Delete blobs that the layout no longer refers to: the candidate's manifest and config."""
    forget(folder)
    named = {blob.digest.hex for image in images_of(whole) for blob, _ in image.blobs()}
    named |= {image.digest.hex for image in images_of(whole)} | {whole.digest.hex}
    for path in (folder / "blobs" / "sha256").iterdir():
        if path.name not in named:
            path.unlink()


def check_layout(folder: Path | None) -> None:
    """Raise UsageError if the layout folder has other files, which the image would replace."""
    if folder is None:
        return
    if not folder.name:
        raise UsageError(f"--layout {folder}: no folder can be put there", hint="name another one")
    folder = _real(folder)
    _recover(folder)
    if not folder.exists():
        return
    others = {"."} if not folder.is_dir() else {path.name for path in folder.iterdir()} - PARTS
    others = {name for name in others if not is_unfinished(name)}
    if others or image_names(folder) - {DEFAULT_NAME, ""}:
        raise UsageError(
            f"{folder} exists and is not the layout of a single image",
            hint="choose a folder that does not exist yet",
        )


def _write(whole: ImageOrIndex, folder: Path, tools: Tools) -> None:
    _require_room(whole, folder)

    def progress(done: int, total: int) -> None:
        tools.progress.advance(done, total, "bytes")

    if isinstance(whole, Index):
        write_index(whole, folder, progress=progress)
    else:
        write_layout(whole, folder, progress=progress)


def _require_room(whole: ImageOrIndex, folder: Path) -> None:
    """Raise EnvironmentFailure if the layout's disk has no room for the missing blobs."""
    store = folder / "blobs" / "sha256"
    sizes = {layer.digest: layer.size for image in images_of(whole) for layer in image.layers}
    needed = sum(size for digest, size in sizes.items() if not (store / digest.hex).is_file())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise EnvironmentFailure(
            f"the image layout needs {human(needed)} of disk, but {folder.parent} has {human(free)}"
            " free",
            hint="free some space there, or give a folder on a larger disk",
        )


def _real(folder: Path) -> Path:
    """Return where a link leads, perhaps to another disk: the link itself stays as it is."""
    return folder.resolve() if folder.is_symlink() else folder


def _old(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def _candidate(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.candidate")
