"""Ctrl-C, SIGTERM or SIGHUP while Python is still importing: one line and exit code 130.

Imports almost nothing, so that it can be called before everything else.

With `invoke`, its own import comes first, about a tenth of a second, and still prints a traceback.
"""

import os
import signal

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def leave_quietly() -> None:
    """Exit at once on these signals from now on, unless ignored, as in a background job.

    For the time before a command begins, when there is nothing to undo; commands raise
    KeyboardInterrupt instead (`raise_it`).
    """
    for number in _ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _leave)


def raise_it() -> None:
    """Do on these signals what Python does: on Ctrl-C, it raises KeyboardInterrupt."""
    for number in _ENDING:
        if signal.getsignal(number) is _leave:
            python = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            signal.signal(number, python)


def ignore_it() -> None:
    """Ignore Ctrl-C from now on: the command has ended, and Python tells of what it interrupts."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _leave(_number: int, _frame: object) -> None:
    os.write(2, b"error: interrupted before it began\n  hint: run the same command again\n")
    os._exit(130)
