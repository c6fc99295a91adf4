"""Files and folders that are whole or as they were, whatever ends the process that writes them.

What is being written has a name of its own and is locked by its writer (`flock`). The kernel frees
the lock when the writer dies, also in another container on the same volume, where numbers of
processes say nothing: so the next writer knows what was left, and deletes it.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import hashlib
import os
import re
import secrets
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from weightsmith.trees import discard

_OURS = re.compile(r"\.weightsmith-[0-9a-f]{16}")
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_FORGOTTEN = 7 * 86400
"""Seconds after which another machine's unfinished work is taken for left."""


def write_whole(path: Path, data: bytes) -> None:
    """Write a file, in a folder that is made if need be; what was there is replaced at once.

    Raises OSError where it cannot be written; then nothing is left of it, and the old file stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, (data,))


def replace_file(path: Path, chunks: Iterable[bytes], mode: int | None = None) -> None:
    """Write a file beside its place, flush it to the disk, and rename it; then flush the folder.

    With `mode` it has these rights whatever the umask. Raises OSError as `write_whole` does, and
    what the chunks raise.
    """
    sweep(path.parent)
    handle, beside = _claim(path.parent)
    try:
        with os.fdopen(handle, "wb", buffering=0) as file:
            for chunk in chunks:
                rest = memoryview(chunk)
                while rest:
                    rest = rest[file.write(rest) :]
            if mode is not None:
                os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
            beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


@contextmanager
def folder_beside(path: Path) -> Iterator[Path]:
    """Make a folder beside a path, to be renamed to it; else it is deleted when the block ends.

    Raises OSError where it cannot be made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent)
    while True:
        folder = _new_name(path.parent)
        folder.mkdir(mode=0o700)
        with suppress(FileNotFoundError):  # swept before it was locked
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            if _lock(handle):
                break
    try:
        yield folder
    finally:
        discard(folder)
        os.close(handle)


def sweep(folder: Path) -> None:
    """Delete what killed writers left in a folder, and nothing of one that is alive.

    Network file systems keep a folder's lock on the machine that took it. So what another machine
    is writing is not judged by its lock: it goes when it is a week old.
    """
    with suppress(OSError), os.scandir(folder) as entries:
        names = [entry.name for entry in entries if is_unfinished(entry.name)]
        for name in names:
            with suppress(OSError):
                if _is_of_this_kernel(name) or _is_old(folder / name):
                    _delete_dead(folder / name)


def is_unfinished(name: str) -> bool:
    """Say whether a name is one that a writer of ours gives to what is not finished."""
    return bool(_OURS.fullmatch(name))


@contextmanager
def alone(folder: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold a folder's lock for the length of the block; one that was renamed meanwhile is another.

    Raises FileNotFoundError where it is not there (any more), BlockingIOError where another
    process has the lock and we are not to wait.
    """
    while True:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if os.path.samestat(folder.stat(), os.fstat(handle)):
                yield
                return
        finally:
            os.close(handle)


def exchange(one: Path, other: Path) -> bool:
    """Let two folders swap their names at once; False where kernel or file system cannot.

    Raises OSError where that is not why it failed. `man 2 renameat2`, RENAME_EXCHANGE.
    """
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:  # another C library
        return False
    if not rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE):
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), str(one))


def age_order(stamp: float) -> tuple[bool, float]:
    """Return what sorts a file's time among others, the oldest first.

    A time to come is one from before the clock was put back, and older than all since.
    """
    return stamp <= time.time(), stamp


def sync_folder(folder: Path) -> None:
    """Make renames within a folder durable."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _claim(folder: Path) -> tuple[int, Path]:
    """Make a file of a new name and lock it; return both."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    while True:
        path = _new_name(folder)
        handle = os.open(path, flags, 0o666)
        if _lock(handle):
            return handle, path


def _new_name(folder: Path) -> Path:
    return folder / f".weightsmith-{_kernel()}{secrets.token_hex(4)}"


@functools.cache
def _kernel() -> str:
    """Return eight hexadecimal digits for the kernel that runs here, the same in its containers."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_bytes()
    return hashlib.sha256(boot).hexdigest()[:8]


def _is_of_this_kernel(name: str) -> bool:
    return name.removeprefix(".weightsmith-").startswith(_kernel())


def _is_old(path: Path) -> bool:
    return time.time() - path.lstat().st_mtime > _FORGOTTEN


def _lock(handle: int) -> bool:
    """Lock what was just made; say whether it is still there, else close it."""
    with suppress(OSError):  # without locks nothing is lost, and what we leave is not swept
        fcntl.flock(handle, fcntl.LOCK_EX)
    if os.fstat(handle).st_nlink:
        return True
    os.close(handle)
    return False


def _delete_dead(path: Path) -> None:
    """Delete an unfinished file or folder whose writer is dead; raises OSError for all others."""
    flags = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        handle = os.open(path, os.O_RDWR | flags)
    except IsADirectoryError:
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | flags)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        discard(path)  # by its name, which is nobody's any more if it was renamed
    finally:
        os.close(handle)
