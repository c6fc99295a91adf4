"""Ctrl-C, SIGTERM and SIGHUP: before a command begins, while it runs, and once it has ended.

While Python is still importing they end it with one line and exit code 130. This file imports
almost nothing, so that it can be called before everything else.

With `invoke`, its own import comes first, about a tenth of a second, and still prints a traceback.
"""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_CLEANING = 10.0
"""Seconds after the first signal in which others do not interrupt it again: what was interrupted
ends its jobs, containers and unfinished files meanwhile."""


def leave_quietly() -> None:
    """Exit at once on these signals from now on, unless ignored, as in a background job.

    For the time before a command begins, when there is nothing to undo; commands raise
    KeyboardInterrupt instead (`interruptible`).
    """
    for number in _ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _leave)


def _raise_it() -> None:
    """Do on these signals what Python does: on Ctrl-C, it raises KeyboardInterrupt."""
    for number in _ENDING:
        if signal.getsignal(number) is _leave:
            python = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            signal.signal(number, python)


@contextmanager
def interruptible() -> Iterator[None]:
    """During the block, the first of these signals raises KeyboardInterrupt, unless it is ignored.

    Those of the next ten seconds are not heard, so that a second Ctrl-C does not interrupt the
    cleaning up; later ones raise it again. A block that an interrupt ended leaves them unheard.
    """
    first: list[float] = []

    def end(_number: int, _frame: object) -> None:
        if not first or time.monotonic() - first[0] > _CLEANING:
            first.append(time.monotonic())
            raise KeyboardInterrupt

    _raise_it()
    heard = [number for number in _ENDING if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, end) for number in heard}
    try:
        yield
    except KeyboardInterrupt:
        _hear_no_more()
        before.clear()
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _hear_no_more() -> None:
    """Let these signals pass from now on: the command has ended, and only tells how.

    Ctrl-C is ignored, since Python tells of what it interrupts at its very end. The others get a
    handler that does nothing, since a program that is still started would ignore them, too.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda _number, _frame: None)


def _leave(_number: int, _frame: object) -> None:
    os.write(2, b"error: interrupted before it began\n  hint: run the same command again\n")
    os._exit(130)
