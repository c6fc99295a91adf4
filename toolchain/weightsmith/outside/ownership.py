"""Whose folders and containers are: marks them with their process, and lets other users read them.

So those of dead processes are found, and a container that runs as another user has its inputs.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from weightsmith.core.errors import EnvironmentFailure
from weightsmith.core.files import sibling_folder
from weightsmith.core.privacy import private
from weightsmith.core.trees import below, give
from weightsmith.models.folder import scan


def owner_token() -> str:
    """Return a text that identifies this process uniquely, also over time.

    It has only letters, digits and dashes, so that it is valid in an image tag.
    """
    pid = os.getpid()
    return f"{_realm()}-{pid}-{_started(pid)}"


def is_dead(token: str) -> bool:
    """Say whether the owner has certainly ended.

    False for owners that this process cannot see: on another machine, from another boot or in
    another process namespace.
    """
    realm, _, rest = token.partition("-")
    pid, _, started = rest.partition("-")
    if realm != _realm() or not pid.isdecimal():
        return False
    now = _started(int(pid))
    if now:
        return now != started
    try:
        os.kill(int(pid), 0)
    except PermissionError:
        return False  # another user's, which /proc hides from us (`hidepid`)
    except OSError:
        pass
    return now != started


def private_folder(cache: Path) -> AbstractContextManager[Path]:
    """Create a folder below the cache that only we can enter; deleted when the block ends.

    Folders left by killed processes are deleted first.
    """
    return sibling_folder(private(cache, "jobs") / "job")


@functools.cache
def _realm() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_bytes().strip()
        namespace = Path("/proc/self/ns/pid").stat().st_ino
    except OSError:  # no /proc, and so nobody can be seen
        boot, namespace = secrets.token_bytes(16), 0
    return hashlib.sha256(boot + str(namespace).encode()).hexdigest()[:12]


def _started(pid: int) -> str:
    """Return when the process started, in kernel ticks; empty if it does not exist."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text("utf-8", errors="replace")
    except OSError:
        return ""
    # The program's name may contain spaces and brackets; the fields after it do not.
    state, *fields = text.rpartition(")")[2].split()
    return "" if state in {"Z", "X"} else fields[18]


_FICLONE = 0x4004_9409
"""FICLONE, see ioctl_ficlone(2): share another file's blocks."""


def readable(source: Path, staging: Path, *, by_others: bool) -> Path:
    """Return a path that the container can read: the source itself, or a private copy.

    A copy below `staging` (hard links if possible) is made if a link in the source leads out of
    it, since only the mount is visible in the container, and, with `by_others`, if a file is not
    readable by everyone.
    """
    real = source.resolve()
    if real.is_file():
        if not by_others or real.stat().st_mode & stat.S_IROTH:
            return real
        staging.mkdir(parents=True)
        return _give(real, staging / source.name)
    inside, linked = [real, *below(real)], leads_out(real)
    if not linked and not (by_others and any(_closed(path) for path in inside)):
        return real
    staging.mkdir(parents=True)
    # Links are followed by the rules for model folders alone.
    names = scan(real) if linked else [p.relative_to(real) for p in inside if p.is_file()]
    for name in names:
        target = staging / name
        target.parent.mkdir(parents=True, exist_ok=True)
        _give((real / name).resolve(), target)
    for folder in [staging, *(path for path in below(staging) if path.is_dir())]:
        folder.chmod(0o755)
    return staging


def leads_out(folder: Path) -> bool:
    """Say whether a link in a folder leads out of it; `folder` itself must not be a link."""
    return any(p.is_symlink() and not p.resolve().is_relative_to(folder) for p in below(folder))


def _closed(path: Path) -> bool:
    """Say whether other users cannot read it."""
    mode = path.lstat().st_mode
    needed = 0o005 if stat.S_ISDIR(mode) else 0o004
    return not stat.S_ISLNK(mode) and mode & needed != needed


def _give(real: Path, target: Path) -> Path:
    if real.stat().st_mode & stat.S_IROTH:
        with suppress(OSError):  # another file system, or a file that we may not link
            os.link(real, target)
            return target
    size, free = real.stat().st_size, shutil.disk_usage(target.parent).free
    with real.open("rb") as source, target.open("wb") as copy:
        try:
            fcntl.ioctl(copy.fileno(), _FICLONE, source.fileno())
        except OSError:
            if size > free:
                raise EnvironmentFailure(
                    f"{real} is not readable by everyone, and {target.parent} has no space for the "
                    f"private copy of {size:,} bytes that the container needs",
                    hint=f"chmod o+r {real}, or build as a non-root user who owns the file",
                ) from None
            shutil.copyfileobj(source, copy, 1 << 24)
    target.chmod(0o444)
    return target


@contextmanager
def owned_by(folder: Path, user: int, group: int) -> Iterator[None]:
    """Give a folder and its content to a user during the block, then take it back."""
    before = folder.stat()
    give(folder, user, group)
    try:
        yield
    finally:
        give(folder, before.st_uid, before.st_gid)
