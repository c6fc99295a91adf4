"""Ctrl-C, SIGTERM or SIGHUP while Python is still importing: one line and exit code 130.

Imports almost nothing, so that it can be called before everything else.
"""

import os
import signal

_DEFAULTS = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGHUP: signal.SIG_DFL,
}
"""Signals that end a command, with what Python does on each."""


def leave_quietly() -> None:
    """Exit at once on these signals from now on, unless ignored, as in a background job.

    For the time before a command begins, when there is nothing to undo; commands raise
    KeyboardInterrupt instead (`raise_it`).
    """
    for number in _DEFAULTS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _leave)


def raise_it() -> None:
    """Do on these signals what Python does: on Ctrl-C, it raises KeyboardInterrupt."""
    for number, default in _DEFAULTS.items():
        if signal.getsignal(number) is _leave:
            signal.signal(number, default)


def ignore_it() -> None:
    """Ignore Ctrl-C from now on: the command has ended, and Python tells of what it interrupts."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _leave(_number: int, _frame: object) -> None:
    os.write(2, b"error: interrupted before it began\n  hint: run the same command again\n")
    os._exit(130)
