"""Keeps cache and store private: they contain weights, questions and answers.

They are created with mode 0700 whatever the umask, and closed if an earlier version left them open.
A folder shared with a group on purpose (set-group-id and group-writable: `chmod g+rws`) stays as it
is. A folder chosen by the user that has other content too, such as /var/cache, stays open; only our
folders in it are closed.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress
from pathlib import Path

_OURS = frozenset(
    {"builders", "jobs", "logs", "pushed", "store", "toolsets"}
    | {"digests", "locks", "memos", "partial", "results"}
)
"""All names that we create in a cache or a store."""
_SHARED = stat.S_ISGID | stat.S_IWGRP


def private(root: Path, name: str = "") -> Path:
    """Return a cache or store, or the folder `name` in it; creates it if needed and closes it.

    Raises OSError if it cannot be created; if it cannot be closed, it stays as it is.
    """
    if not root.is_dir():
        root.parent.mkdir(parents=True, exist_ok=True)
        _make(root)
    closed = not is_shared(root)
    if closed:
        for folder in open_to_others(root):
            with suppress(OSError):
                folder.chmod(0o700)
    if not name:
        return root
    folder = root / name
    if closed and not folder.is_dir():
        _make(folder)
    folder.mkdir(exist_ok=True)
    return folder


def is_shared(root: Path) -> bool:
    """Say whether a cache or store is shared with a group on purpose."""
    return root.stat().st_mode & _SHARED == _SHARED


def open_to_others(root: Path) -> list[Path]:
    """Return our folders, of a cache or store, that other users can enter or read."""
    found = []
    alone = True
    with suppress(OSError), os.scandir(root) as entries:
        for entry in entries:
            status = entry.stat(follow_symlinks=False)
            if entry.name not in _OURS or status.st_mode & _SHARED == _SHARED:
                alone = False  # the group must be able to pass through
            elif _is_open(status):
                found.append(Path(entry.path))
        if alone and _is_open(root.stat()):
            found.append(root)
    return found


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
