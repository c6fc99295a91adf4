"""Atomic writes of files and folders: complete or unchanged, even if the process is killed.

Unfinished output has a random name and is locked by its writer (`flock`). The kernel releases the
lock when the writer dies, even in another container on the same volume, where process numbers mean
nothing. So the next writer recognizes leftovers and deletes them.
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
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from weightsmith.core.trees import discard
from weightsmith.core.waiting import kept_by_programs, take

_OURS = re.compile(r"\.weightsmith-[0-9a-f]{16}")
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_FORGOTTEN = 7 * 86400
"""Seconds after which another machine's unfinished work counts as left over."""
_SYNCED_WHOLE = frozenset({"btrfs", "ext4", "overlay", "xfs"})
"""File systems of which syncfs waits for the disk; not so of most in user space."""


def path_in(variable: str) -> Path | None:
    """Return the path that an environment variable names, ~ expanded; None where it is not set.

    A shell expands ~ only where it is not quoted, and a CI's file of settings never does. Raises
    RuntimeError for the name of a user who has no home folder.
    """
    named = os.environ.get(variable)
    return Path(named).expanduser() if named else None


def write_whole(path: Path, data: bytes, *, lasting: bool = True) -> None:
    """Write a file atomically; creates its folder if needed.

    Unless `lasting`, a machine that loses its power may lose it, and the disk is not waited for.
    Raises OSError if it cannot be written; then the old file stays and nothing else is left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _replace(path, (data,), lasting=lasting)
    if lasting:
        sync_folder(path.parent)


def write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files of one folder, each atomically; creates the folder, and keeps what is the same.

    The disk is waited for once for each file, and once for the folder. Raises OSError as
    `write_whole` does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parents = set[Path]()
    for name, data in files.items():
        path = folder / name
        with suppress(OSError):
            status = path.lstat()
            same = stat.S_ISREG(status.st_mode) and status.st_size == len(data)
            if same and path.read_bytes() == data:
                continue
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path, (data,))
        parents.add(path.parent)
    for parent in parents:
        sync_folder(parent)


def replace_file(path: Path, chunks: Iterable[bytes], mode: int | None = None) -> None:
    """Write a temporary file, flush it to disk and rename it to `path`; then flush the folder.

    `mode` sets its permissions regardless of the umask. Raises OSError as `write_whole` does, and
    what the chunks raise.
    """
    _replace(path, chunks, mode)
    sync_folder(path.parent)


def _replace(
    path: Path, chunks: Iterable[bytes], mode: int | None = None, *, lasting: bool = True
) -> None:
    sweep(path.parent)
    handle, temporary = _claim(path.parent)
    try:
        with os.fdopen(handle, "wb", buffering=0) as file:
            for chunk in chunks:
                rest = memoryview(chunk)
                while rest:
                    rest = rest[file.write(rest) :]
            if mode is not None:
                os.fchmod(file.fileno(), mode)
            if lasting:
                os.fsync(file.fileno())
            temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def sibling_folder(path: Path) -> Iterator[Path]:
    """Create a temporary folder in the path's parent, for the block to rename to the path.

    If the block does not rename it, it is deleted. Raises OSError if it cannot be created.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent)
    while True:
        folder = _new_name(path.parent)
        folder.mkdir(mode=0o700)
        with suppress(FileNotFoundError):  # another process deleted it before it was locked
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            if _lock(handle):
                break
    try:
        with kept_by_programs(handle):
            try:
                yield folder
            finally:
                discard(folder)
    finally:
        os.close(handle)


@contextmanager
def marked(folder: Path) -> Iterator[str]:
    """Keep an empty file in a folder, and yield its name: who finds it there sees the same folder.

    What a killed process left is deleted by the next writer. Raises OSError if it cannot be made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder)
    handle, path = _claim(folder)
    try:
        yield path.name
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


def sweep(folder: Path) -> None:
    """Delete what killed writers left in a folder, and nothing of a living one.

    On network file systems a folder's lock is visible only on the machine that holds it. So another
    machine's unfinished work is deleted when it is a week old, whatever its lock.
    """
    with suppress(OSError), os.scandir(folder) as entries:
        names = [entry.name for entry in entries if is_unfinished(entry.name)]
        for name in names:
            path = folder / name
            of_this_kernel = name.removeprefix(".weightsmith-").startswith(_kernel())
            with suppress(OSError):
                if of_this_kernel or time.time() - path.lstat().st_mtime > _FORGOTTEN:
                    _delete_dead(path)


def is_unfinished(name: str) -> bool:
    """Say whether a name is one that we give to unfinished work."""
    return bool(_OURS.fullmatch(name))


@contextmanager
def folder_lock(
    folder: Path, *, wait: bool = True, tell: Callable[[str], None] = lambda _: None
) -> Iterator[None]:
    """Hold a folder's lock during the block; if the folder is replaced meanwhile, lock the new one.

    Before it waits, `tell` gets who has the lock. Raises FileNotFoundError if the folder does not
    exist, BlockingIOError without `wait` if another process has the lock.
    """
    while True:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if wait:
                take(handle, fcntl.LOCK_EX, tell)
            else:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(folder.stat(), os.fstat(handle)):
                with kept_by_programs(handle):
                    yield
                return
        finally:
            os.close(handle)


def exchange(one: Path, other: Path) -> bool:
    """Swap the names of two folders atomically; False if kernel or file system cannot.

    Raises OSError for any other failure. `man 2 renameat2`, RENAME_EXCHANGE.
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
    """Return a sort key for file times, oldest first.

    A future time was set before the clock was put back, so it sorts before all others.
    """
    return stamp <= time.time(), stamp


def sync_folder(folder: Path) -> None:
    """Make renames within a folder durable."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_all(folder: int) -> bool:
    """Make everything in an open folder's file system durable; False where that is not certain.

    Raises OSError if anything of it was not written since the folder was opened (`man 2 syncfs`,
    which tells that since Linux 5.8).
    """
    version = re.match(r"(\d+)\.(\d+)", os.uname().release)
    if not version or (int(version[1]), int(version[2])) < (5, 8):
        return False
    if _file_system(folder) not in _SYNCED_WHOLE:
        return False
    try:
        sync = ctypes.CDLL(None, use_errno=True).syncfs
    except AttributeError:  # another C library
        return False
    if sync(folder):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return True


def _file_system(handle: int) -> str:
    """Return the type of the file system that a file lies in, or nothing if that is not told."""
    device = os.fstat(handle).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    with suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_bytes().splitlines():
            mount, _, source = line.partition(b" - ")
            if mount.split()[2:3] == [wanted.encode()] and source:
                return source.split()[0].decode(errors="replace")
    return ""


def _claim(folder: Path) -> tuple[int, Path]:
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
    """Return eight hexadecimal digits that identify the running kernel, also in its containers.

    Where it does not tell (no /proc), they are this process's own.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_bytes()
    except OSError:
        boot = secrets.token_bytes(16)
    return hashlib.sha256(boot).hexdigest()[:8]


def _lock(handle: int) -> bool:
    """Lock what was just created; if it was deleted meanwhile, close it and return False."""
    with suppress(OSError):  # without locks nothing breaks, but leftovers stay for a week
        fcntl.flock(handle, fcntl.LOCK_EX)
    if os.fstat(handle).st_nlink:
        return True
    os.close(handle)
    return False


def _delete_dead(path: Path) -> None:
    """Delete an unfinished file or folder of a dead writer; raises OSError for all others."""
    flags = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        handle = os.open(path, os.O_RDWR | flags)
    except IsADirectoryError:
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | flags)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        discard(path)  # by name: if it was renamed, nobody uses this name
    finally:
        os.close(handle)
