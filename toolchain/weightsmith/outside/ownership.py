"""Marks containers and folders with their owning process, to find those of dead processes."""

from __future__ import annotations

import hashlib
import os
from contextlib import AbstractContextManager
from pathlib import Path

from weightsmith.core.files import sibling_folder
from weightsmith.core.privacy import private


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


def _realm() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_bytes().strip()
    namespace = Path("/proc/self/ns/pid").stat().st_ino
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
