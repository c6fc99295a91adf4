"""Sizes for people, and the memory of this machine. Bytes throughout."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path

from weightsmith.core.errors import UsageError

MIB = 1 << 20
GIB = 1 << 30

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", re.IGNORECASE)
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
_CGROUPS = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")


def parse_size(text: str) -> int:
    """Return the bytes of "24GiB", "24GB", "512M" or "1.5 G".

    `i` makes it binary, its absence decimal, as in the SI. Raises UsageError otherwise.
    """
    match = _SIZE.fullmatch(text.strip())
    number, unit, binary = match.groups() if match else ("inf", "", "")
    size = float(number) * (1024 if binary else 1000) ** _POWERS[unit.upper()]
    if not math.isfinite(size):
        raise UsageError(f"not a size: {text[:40]!r}", hint="write it like 24GiB, 24GB or 512MiB")
    return int(size)


def human(size: int) -> str:
    """Return bytes for people, in binary units with one decimal."""
    for unit, step in (("GiB", GIB), ("MiB", MIB), ("KiB", 1024)):
        if abs(size) >= step:
            return f"{size / step:.1f} {unit}"
    return f"{size} B"


def host_memory() -> int:
    """Return this machine's memory, or this container's limit where that is lower."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in _CGROUPS:
        try:
            limit = path.read_text("ascii").strip()
        except OSError:
            continue
        if limit.isdigit():
            return min(total, int(limit))
    return total
