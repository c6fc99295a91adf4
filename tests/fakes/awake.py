"""Hears Ctrl-C, as a program in the foreground does, and waits for what is sure to come."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable


def hear_interrupts() -> None:
    """Take the default handler: a run under `nohup`, cron or `&` ignores it, with all it starts."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def until(there: Callable[[], object], patience: float = 120.0) -> None:
    """Wait until this is true, however busy the machine is."""
    end = time.monotonic() + patience
    while not there():
        assert time.monotonic() < end
        time.sleep(0.05)
