"""Keeps cache and store private: they contain weights, questions and answers.

They are created with mode 0700 whatever the umask, and closed if they are open.
One that belongs to another user is refused: its owner could read every result, and change it. A
folder shared with a group on purpose (set-group-id and group-writable: `chmod g+rws`) stays as it
is, for the members of the group. A folder chosen by the user that has other content too, such as
/var/cache, stays open; only our folders in it are closed.

Set-group-id marks a shared store because no umask sets it by accident.
"""

from __future__ import annotations

import errno
import os
import pwd
import stat
import tempfile
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

_OURS = frozenset(
    {"builders", "jobs", "logs", "pushed", "store", "toolsets"}
    | {"digests", "locks", "memos", "partial", "results"}
)
"""All names that we create in a cache or a store."""
_SHARED = stat.S_ISGID | stat.S_IWGRP


class AnothersFolder(PermissionError):
    """A cache or a store, or a folder of ours in it, that belongs to another user."""


@dataclass(slots=True)
class Owners:
    """Which of our folders, of a cache or store, are not this user's alone."""

    opened: list[Path] = field(default_factory=list)
    """Others can enter or read them."""
    anothers: dict[Path, str] = field(default_factory=dict)
    """They belong to the user of that name."""


def private(root: Path, name: str = "") -> Path:
    """Return a cache or store, or the folder `name` in it; creates it if needed and closes it.

    Raises OSError if it cannot be created, AnothersFolder if it belongs to another user; if it
    cannot be closed, it stays as it is.
    """
    if not root.is_dir():
        root.parent.mkdir(parents=True, exist_ok=True)
        _make(root)
    closed = not is_shared(root)
    for folder in require_own(root).opened:
        with suppress(OSError):
            folder.chmod(0o700)
    if not name:
        return root
    folder = root / name
    if closed and not folder.is_dir():
        _make(folder)
    folder.mkdir(exist_ok=True)
    return folder


def require_own(root: Path) -> Owners:
    """Return `owners`; raises AnothersFolder if anything belongs to another user."""
    found = owners(root)
    for folder, user in found.anothers.items():
        why = f"it belongs to another user ({user}), who can read and change what is in it"
        raise AnothersFolder(errno.EPERM, why, str(folder))
    return found


def is_shared(root: Path) -> bool:
    """Say whether a cache or store is shared on purpose, with a group that this user is in."""
    return _is_shared(root.stat())


def owners(root: Path) -> Owners:
    """Return which of our folders, of a cache or store, are not this user's alone.

    Nothing of one that is shared on purpose, or does not exist.
    """
    found = Owners()
    with suppress(OSError):
        status = root.stat()
        if _is_shared(status):
            return found
        _note_another(found, root, status)
        alone = True
        with os.scandir(root) as entries:
            for entry in entries:
                own = entry.stat(follow_symlinks=False)
                if entry.name not in _OURS or own.st_mode & _SHARED == _SHARED:
                    alone = False  # the group must be able to pass through
                elif _is_open(own):
                    found.opened.append(Path(entry.path))
                if entry.name in _OURS and not _is_shared(own):
                    _note_another(found, Path(entry.path), own)
        if alone and _is_open(status):
            found.opened.append(root)
    return found


def _note_another(found: Owners, folder: Path, status: os.stat_result) -> None:
    user = status.st_uid
    if user in (0, os.geteuid()):  # root may do everything anyway, and prepares stores for others
        return
    with suppress(OSError), tempfile.TemporaryFile(dir=folder) as file:
        if os.fstat(file.fileno()).st_uid == user:  # as on some network file systems
            return
    found.anothers[folder] = str(user)
    with suppress(KeyError):
        found.anothers[folder] = pwd.getpwuid(user).pw_name


def _is_shared(status: os.stat_result) -> bool:
    ours = status.st_uid in (0, os.geteuid()) or status.st_gid in (os.getegid(), *os.getgroups())
    return ours and status.st_mode & _SHARED == _SHARED


def _is_open(status: os.stat_result) -> bool:
    is_mine = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
    return is_mine and bool(status.st_mode & 0o077)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        if not folder.is_dir():  # else another process created it
            why = os.strerror(errno.ENOTDIR)
            raise NotADirectoryError(errno.ENOTDIR, why, str(folder)) from None
    else:
        if folder.stat().st_mode & 0o7777 != 0o700:  # because of the umask or inherited bits
            with suppress(OSError):  # some network file systems have no modes: `doctor` says so
                folder.chmod(0o700)
