"""Ctrl-C, SIGTERM and SIGHUP: before a command begins, while it runs, and once it has ended.

Before and after a command they end the program with one line and exit code 130, and while Python
clears up they are not heard: the command's own exit code counts. This file imports almost nothing,
so that it can be called before everything else.

With `invoke`, its own import comes first, about a tenth of a second, and still prints a traceback.
"""

import atexit
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_CLEANING = 10.0
"""Seconds after the first signal in which others do not interrupt it again: what was interrupted
ends its jobs, containers and unfinished files meanwhile."""


def leave_quietly() -> None:
    """Exit at once on these signals outside of commands, unless ignored, as in a background job.

    For a program of ours: there is nothing to undo before and after a command, which itself raises
    KeyboardInterrupt instead (`interruptible`).
    """
    _set(_leave)
    atexit.register(_ignore)  # the first one to be registered is the last one to run


def leave_quietly_at_first() -> None:
    """Do the same, but from the end of the first command on what Python does itself.

    For `invoke`, which may have other tasks after ours.
    """
    _set(_leave_at_first)


def _set(handler: Callable[[int, FrameType | None], None]) -> None:
    for number in _ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


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
            python = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            signal.signal(number, python if handler is _leave_at_first else handler)


def _hear_no_more() -> None:
    """Let these signals pass from now on: the command has ended, and only tells how.

    Ctrl-C is ignored, since Python tells of what it interrupts at its very end. The others get a
    handler that does nothing, since a program that is still started would ignore them, too.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda _number, _frame: None)


def _ignore() -> None:
    """Let Python clear up, which can take a second, and end with the command's own exit code.

    No program is started any more that would ignore them, too.
    """
    for number in _ENDING:
        signal.signal(number, signal.SIG_IGN)


def _leave(_number: int, _frame: object) -> None:
    os.write(
        2, b"error: interrupted\n  hint: run the same command again: what was finished is kept\n"
    )
    os._exit(130)


def _leave_at_first(number: int, frame: object) -> None:
    _leave(number, frame)
