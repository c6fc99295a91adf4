"""Names the process that owns something outside it, so that leftovers of dead owners are found."""

from __future__ import annotations

import os
from pathlib import Path


def owner_token() -> str:
    """Return a text that names this process and no other, before or after it."""
    pid = os.getpid()
    return f"{_realm()}/{pid}/{_started(pid)}"


def is_dead(token: str) -> bool:
    """Say whether the owner has certainly ended.

    False for owners that this process cannot see: those of another machine, another boot or
    another process namespace.
    """
    realm, _, rest = token.rpartition("/")[0].rpartition("/")
    started = token.rpartition("/")[2]
    if realm != _realm() or not rest.isdecimal():
        return False
    return _started(int(rest)) != started


def _realm() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    namespace = Path("/proc/self/ns/pid").stat().st_ino
    return f"{boot}/{namespace}"


def _started(pid: int) -> str:
    """Return when the process started, in the kernel's ticks; empty where there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text("utf-8", errors="replace")
    except OSError:
        return ""
    # The program's name may hold spaces and brackets; the fields after it do not.
    state, *fields = text.rpartition(")")[2].split()
    return "" if state in {"Z", "X"} else fields[18]
