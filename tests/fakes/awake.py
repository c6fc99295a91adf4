"""Hears Ctrl-C, as a program in the foreground does."""

from __future__ import annotations

import signal


def hear_interrupts() -> None:
    """Take the default handler: a run under `nohup`, cron or `&` ignores it, with all it starts."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
