"""Wait for a file's lock: who has it, and an end to the wait in a thread that must end.

And keep it until all that we started has ended, even if we are killed before.
"""

from __future__ import annotations

import fcntl
import os
import select
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

PAUSE = 0.2
"""Seconds between two tries in a thread."""
_STOP: ContextVar[int] = ContextVar("stop", default=-1)

_KEPT: set[int] = set()
_KEEPING = threading.Lock()


@contextmanager
def kept_by_programs(handle: int) -> Iterator[None]:
    """During the block, programs are started with this lock: if we are killed, theirs goes last.

    It is unlocked at the end of the block, whoever else has the file open.
    """
    with _KEEPING:
        _KEPT.add(handle)
    try:
        yield
    finally:
        with _KEEPING:
            _KEPT.discard(handle)
            with suppress(OSError):  # a file system without locks
                fcntl.flock(handle, fcntl.LOCK_UN)


@contextmanager
def locks_for_programs() -> Iterator[list[int]]:
    """Yield the locks that a program must be started with; none is released during the block."""
    with _KEEPING:
        yield sorted(_KEPT)


@contextmanager
def stopped_by(stop: int) -> Iterator[None]:
    """End this thread's waits with KeyboardInterrupt once the open file `stop` can be read.

    Ctrl-C ends only the main thread's.
    """
    token = _STOP.set(stop)
    try:
        yield
    finally:
        _STOP.reset(token)


def check_stopped(seconds: float = 0.0) -> None:
    """Wait so long at most; raise KeyboardInterrupt if this thread's waits must end."""
    poll = select.poll()  # `select` takes no open files above 1024
    if (stop := _STOP.get()) >= 0:
        poll.register(stop, select.POLLIN)
    if poll.poll(seconds * 1000):
        raise KeyboardInterrupt


def take(handle: int, how: int, tell: Callable[[str], None]) -> None:
    """Lock an open file, as `fcntl.flock` does; if another process has it, say so once and wait.

    `tell` gets who it is, as `holder` says.
    """
    try:
        fcntl.flock(handle, how | fcntl.LOCK_NB)
    except BlockingIOError:
        tell(holder(handle))
    else:
        return
    while _STOP.get() >= 0:
        check_stopped(PAUSE)
        with suppress(BlockingIOError):
            fcntl.flock(handle, how | fcntl.LOCK_NB)
            return
    fcntl.flock(handle, how)  # the kernel releases it when the other process dies


def holder(place: int | Path) -> str:
    """Return who has the lock of a file: `another process`, with its number where that is known."""
    with suppress(OSError, ValueError):
        about = os.stat(place)  # noqa: PTH116 - also of an open file
        device = f"{os.major(about.st_dev):02x}:{os.minor(about.st_dev):02x}:{about.st_ino}"
        for line in Path("/proc/locks").read_text("ascii").splitlines():
            _, kind, *_, process, where, _, _ = line.split()
            # A process of another container has no number here; waiting ones are of no interest.
            if where == device and kind == "FLOCK" and int(process) not in (0, os.getpid()):
                return f"another process ({process})"
    return "another process"
