"""How long work may take: foreign patterns and templates in CPU time, jobs by their size."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from weightsmith.errors import UsageError

FOREIGN_SECONDS = 20.0
"""CPU time that a pattern or template of an input may take; honest ones take milliseconds."""

VARIABLE = "WEIGHTSMITH_JOB_SECONDS"
_LEAST = 1800
_PER_GB = 600.0
"""Seconds a job may take for each GB of weights; measured are 3 to 30 CPU seconds."""
GGUF_PER_GB = 3_000.0
"""The same for GGUF, which takes 60 with an importance matrix."""
PACKING_PER_GB = 30_000.0
"""The same for packed checkpoints; AWQ, which searches by measuring, takes 1,040."""
_PER_TOKEN = 2.0
"""Seconds for each GB and token that a model reads or writes; measured is less than 0.1."""
_TICK, _DIGITS = 0.25, 9
_WINDOW, _LEAST_RATE = 300.0, 1000


class TooLong(Exception):
    """A block used up its CPU time."""


class _Ring(BaseException):
    """Passes through libraries that handle every Exception."""


@contextmanager
def cpu_limit(seconds: float) -> Iterator[None]:
    """Raise TooLong where the block takes more CPU time on this thread; not to be nested.

    CPU time, so that nothing is cut because the machine is busy. A timer's signal interrupts
    Python code and `re` (which looks for signals while it matches) on the main thread; on another
    thread nothing is limited here, and a job still has its own limit.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    began = time.thread_time()

    def ring(_number: int, _frame: object) -> None:
        # The timer counts all threads of the process.
        if time.thread_time() - began >= seconds:
            raise _Ring

    before = signal.signal(signal.SIGVTALRM, ring)
    tick, timer = min(_TICK, seconds), (0.0, 0.0)
    try:
        try:
            # Again and again, in case that something swallows the first.
            timer = signal.setitimer(signal.ITIMER_VIRTUAL, tick, tick)
            yield
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    except _Ring:
        raise TooLong from None
    finally:
        signal.signal(signal.SIGVTALRM, before or signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_VIRTUAL, *timer)  # whoever uses us as a library had one


def steady(chunks: Iterable[bytes], size: int = 0) -> Iterator[bytes]:
    """Yield what comes, in chunks of `size` bytes where that is given.

    Raises TooLong where it was waited for during five minutes with less than 1 kB a second: each
    byte may come in time, and the last one never.
    """
    waited, got, held, asked = 0.0, 0, bytearray(), time.monotonic()
    for chunk in chunks:
        waited += time.monotonic() - asked
        got += len(chunk)
        if waited >= _WINDOW:
            if got < _WINDOW * _LEAST_RATE:
                raise TooLong
            waited = got = 0
        held += chunk
        if len(held) >= size:
            yield bytes(held)
            held.clear()
        asked = time.monotonic()
    if held:
        yield bytes(held)


def _to_nobody(_what: str) -> None:
    """Tell nobody."""


_tell: Callable[[str], None] = _to_nobody
_now = ""


def tell_what_is_done(tell: Callable[[str], None]) -> None:
    """Call `tell` with what begins from now on, and where it has ended with what is around it."""
    global _tell
    _tell = tell


@contextmanager
def doing(what: str) -> Iterator[None]:
    """Name what the block does, for the message of a job that is ended in it."""
    global _now
    around, _now = _now, what
    _tell(what)
    try:
        yield
    finally:
        _now = around
        _tell(around)


def job_seconds(size: int, *, per_gb: float = _PER_GB, tokens: int = 0) -> int:
    """Return the most seconds that a job on `size` bytes of weights may take; 0 for no limit.

    Half an hour, and for each GB thirty times what was measured or more (benchmarks/README.md);
    `tokens` are those that a model reads and writes one after the other. WEIGHTSMITH_JOB_SECONDS
    takes the place of all that. Raises UsageError where it is no whole number.
    """
    if (chosen := chosen_seconds()) is not None:
        return chosen
    return _LEAST + int(size / 1e9 * (per_gb + tokens * _PER_TOKEN))


def chosen_seconds() -> int | None:
    """Return what WEIGHTSMITH_JOB_SECONDS says, None where it is not set; UsageError as above."""
    text = os.environ.get(VARIABLE, "").strip()
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= _DIGITS):
        raise UsageError(
            f"{VARIABLE} is {text!r}, which is no number of seconds",
            hint="give a whole number; 0 lets jobs take as long as they like",
        )
    return int(text)
