"""The limit of a process's open files."""

from __future__ import annotations

import resource
from contextlib import suppress


def allow_more(opened: int) -> None:
    """Raise this process's limit as far as it may once half of it is taken.

    `opened` is the latest descriptor. Most systems let a program open 1024 files unless it asks
    for more, since `select` knows no more; nothing here uses it.
    """
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if now < most and opened >= now // 2:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
