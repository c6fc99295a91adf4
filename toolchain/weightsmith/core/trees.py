"""Walks and deletes untrusted trees, whatever their depth, modes and links.

`shutil.rmtree`, `os.walk` and `Path.rglob` of Python 3.11 are recursive, and paths are limited to
4,096 bytes: a thousand nested folders break both. Here each step is one name in an open folder, and
only two folders are open at a time.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_CLOSED = (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM)
_LONGEST_PATH = 4096
_FOLDER = os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class TreeEntry:
    """One entry of a tree: its name in an open folder, which the next step closes."""

    parent: int
    name: str
    is_folder: bool


@dataclass(slots=True)
class _Level:
    name: str
    identity: tuple[int, int]
    left: list[tuple[str, bool]]


def remove(path: Path) -> None:
    """Delete a file, a link or a tree, if it exists; raises OSError if anything remains."""
    if problem := discard(path):
        raise problem


def discard(path: Path) -> OSError | None:
    """Delete a file, a link or a tree; return the error if anything remains, else None.

    Never raises OSError. What cannot be deleted is skipped; folders without permission are made
    accessible first, if we own them.
    """
    first: OSError | None = None
    try:
        for step in walk(path, open_up=True):
            try:
                (os.rmdir if step.is_folder else os.unlink)(step.name, dir_fd=step.parent)
            except FileNotFoundError:  # another process deleted it
                pass
            except OSError as error:
                first = first or error
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        first = first or error
    return first


def walk(top: Path, *, open_up: bool = False) -> Iterator[TreeEntry]:
    """Yield the entries of a tree, each folder after its content, and last the tree itself.

    Links are never followed. Of an unreadable folder only itself is yielded; with `open_up` our own
    folders are made readable first. Raises OSError if the top cannot be opened, or if folders are
    moved meanwhile.
    """
    here = os.open(top.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        mode = os.lstat(top.name, dir_fd=here).st_mode
        levels = [_Level("", _identity(here), [(top.name, mode & 0o170000 == 0o040000)])]
        while levels[-1].left or len(levels) > 1:
            if levels[-1].left:
                name, is_folder = levels[-1].left.pop()
                inside = _open(name, here, open_up=open_up) if is_folder else None
                if inside is None:
                    yield TreeEntry(here, name, is_folder)
                    continue
                os.close(here)
                here = inside
                left = []
                with suppress(OSError), os.scandir(here) as entries:
                    left = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
                levels.append(_Level(name, _identity(here), left))
            else:
                done = levels.pop()
                up = os.open("..", os.O_PATH | _FOLDER, dir_fd=here)
                os.close(here)
                here = up
                if _identity(here) != levels[-1].identity:
                    raise OSError(errno.ESTALE, "moved while it was walked", str(top))
                yield TreeEntry(here, done.name, is_folder=True)
    finally:
        os.close(here)


def give(top: Path, user: int, group: int) -> None:
    """Make a user the owner of a folder and all that is in it.

    Links that a container may have left change themselves and are never followed. Raises OSError.
    """
    for step in walk(top):
        os.chown(step.name, user, group, dir_fd=step.parent, follow_symlinks=False)


def below(top: Path) -> list[Path]:
    """Return all paths below a folder, sorted; links are listed, never followed.

    A missing or unreadable folder has no paths, and too long paths are left out. Raises OSError for
    problems of this process, such as too many open files.
    """
    found, folders = [], [str(top)]
    while folders:
        try:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    if len(os.fsencode(entry.path)) >= _LONGEST_PATH:
                        continue
                    found.append(Path(entry.path))
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
        except OSError as error:
            if error.errno not in _CLOSED:
                raise
    return sorted(found)


def _open(name: str, parent: int, *, open_up: bool) -> int | None:
    try:
        folder = os.open(name, os.O_RDONLY | _FOLDER, dir_fd=parent)
    except PermissionError:
        if not open_up:
            return None
        with suppress(OSError):
            closed = os.open(name, os.O_PATH | _FOLDER, dir_fd=parent)
            try:
                os.chmod(f"/proc/self/fd/{closed}", 0o700)  # noqa: PTH101 - of exactly the open one
            finally:
                os.close(closed)
            return _open(name, parent, open_up=False)
        return None
    except OSError:
        return None
    if open_up and os.fstat(folder).st_mode & 0o700 != 0o700:
        with suppress(OSError):
            os.fchmod(folder, 0o700)
    return folder


def _identity(folder: int) -> tuple[int, int]:
    status = os.fstat(folder)
    return status.st_dev, status.st_ino
