"""Names the process that owns something outside it, so that leftovers of dead owners are found."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from weightsmith.files import folder_beside
from weightsmith.privacy import private
from weightsmith.trees import discard


def owner_token() -> str:
    """Return a text that names this process and no other, before or after it.

    Of letters, digits and dashes, so that it may stand in an image's tag.
    """
    pid = os.getpid()
    return f"{_realm()}-{pid}-{_started(pid)}"


def is_dead(token: str) -> bool:
    """Say whether the owner has certainly ended.

    False for owners that this process cannot see: those of another machine, another boot or
    another process namespace.
    """
    realm, _, rest = token.partition("-")
    pid, _, started = rest.partition("-")
    if realm != _realm() or not pid.isdecimal():
        return False
    now = _started(int(pid))
    return now != started and (bool(now) or not _is_hidden(int(pid)))


@contextmanager
def private_folder(cache: Path) -> Iterator[Path]:
    """Make a folder below the cache that only we can enter, deleted when the block ends.

    What killed processes left there before is deleted first.
    """
    jobs = private(cache, "jobs")
    for left in jobs.iterdir():
        if is_dead(left.name.partition(".")[0]):  # as versions before this one named them
            discard(left)
    with folder_beside(jobs / "job") as folder:
        yield folder


def _is_hidden(pid: int) -> bool:
    """Say whether a process is there that /proc keeps from us (`hidepid`): another user's."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except OSError:
        return False
    return False  # ours, of which /proc tells all


def _realm() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_bytes().strip()
    namespace = Path("/proc/self/ns/pid").stat().st_ino
    return hashlib.sha256(boot + str(namespace).encode()).hexdigest()[:12]


def _started(pid: int) -> str:
    """Return when the process started, in the kernel's ticks; empty where there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text("utf-8", errors="replace")
    except OSError:
        return ""
    # The program's name may hold spaces and brackets; the fields after it do not.
    state, *fields = text.rpartition(")")[2].split()
    return "" if state in {"Z", "X"} else fields[18]
