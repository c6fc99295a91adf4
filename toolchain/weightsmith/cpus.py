"""How many threads a computation gets on this machine."""

from __future__ import annotations

import os


def all_but_one() -> int:
    """Return the CPUs of this process but one, and at least one.

    If one thread is preempted, all others wait for it; a free CPU makes that rare.
    """
    return max(1, len(os.sched_getaffinity(0)) - 1)
