"""Ctrl-C while Python is still importing: one line and exit code 130, no traceback.

Imports almost nothing, so that it can be called before everything else.
"""

import os
import signal


def leave_quietly() -> None:
    """Exit at once on Ctrl-C from now on, unless it is ignored, as in a background job.

    For the time before a command begins, when there is nothing to undo; commands raise
    KeyboardInterrupt instead (`raise_it`).
    """
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _leave)


def raise_it() -> None:
    """Raise KeyboardInterrupt on Ctrl-C again, as Python does, unless it is ignored."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def ignore_it() -> None:
    """Ignore Ctrl-C from now on: the command has ended, and Python tells of what it interrupts."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _leave(_number: int, _frame: object) -> None:
    os.write(2, b"error: interrupted before it began\n  hint: run the same command again\n")
    os._exit(130)
