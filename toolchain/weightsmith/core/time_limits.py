"""Time limits: CPU time for untrusted patterns and templates, time by size for jobs.

A limit on silence would not do: a quantizer prints nothing during its longest step. CPU time does
not depend on how busy the machine is; a timer's signal ends a pattern, because Python's `re` looks
for signals while it matches. RE2 has no lookaheads, and `regex` reads some patterns otherwise than
the `re` that PEFT uses.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from weightsmith.core.errors import EnvironmentFailure, UsageError, of_panic

_T = TypeVar("_T")

FOREIGN_SECONDS = 20.0
"""CPU seconds for a pattern or template from an input; honest ones take milliseconds."""

VARIABLE = "WEIGHTSMITH_JOB_SECONDS"
_LEAST = 1800
_PER_GB = 600.0
"""Seconds that a job may take per GB of weights; 3 to 30 CPU seconds were measured."""
GGUF_PER_GB = 3_000.0
"""The same for GGUF; 60 were measured with an importance matrix."""
PACKING_PER_GB = 30_000.0
"""The same for packed checkpoints; 1,040 were measured for AWQ, which searches for scales."""
ROUNDING_PER_GB = 600.0
"""The same for those that are rounded a few rows at a time; 7 were measured, 14 with numpy."""
_PER_TOKEN = 2.0
"""Seconds per GB and token that a model reads or writes; less than 0.1 was measured."""
_TICK, _DIGITS = 0.25, 9


class TooLong(Exception):
    """A block exceeded its CPU time."""


class _Alarm(BaseException):
    """A BaseException, so that libraries which handle every Exception do not catch it."""


@contextmanager
def cpu_limit(seconds: float) -> Iterator[None]:
    """Raise TooLong if the block takes more CPU time; cannot be nested.

    CPU time, so that nothing fails because the machine is busy. On the main thread, a timer's
    signal interrupts Python code, `re` and arithmetic; on another one only Python code can be,
    between two of its instructions. So patterns go through core/apart.py there.
    """
    if threading.current_thread() is not threading.main_thread():
        with _limit_of_a_thread(seconds):
            yield
        return
    began = time.thread_time()

    def alarm(_number: int, _frame: object) -> None:
        # The timer counts all threads of the process.
        if time.thread_time() - began >= seconds:
            raise _Alarm

    before = signal.signal(signal.SIGVTALRM, alarm)
    tick, timer = min(_TICK, seconds), (0.0, 0.0)
    try:
        try:
            # Repeated, in case something swallows the first one.
            timer = signal.setitimer(signal.ITIMER_VIRTUAL, tick, tick)
            yield
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    except _Alarm:
        raise TooLong from None
    finally:
        signal.signal(signal.SIGVTALRM, before or signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_VIRTUAL, *timer)  # the caller's own timer, if any


@contextmanager
def _limit_of_a_thread(seconds: float) -> Iterator[None]:
    """As `cpu_limit`, on a thread that gets no signals: another one looks at its clock."""
    this, ended = threading.get_ident(), threading.Event()
    clock = time.pthread_getcpuclockid(this)
    until = time.clock_gettime(clock) + seconds

    def watch() -> None:
        while not ended.wait(min(_TICK, seconds)):
            if time.clock_gettime(clock) >= until:
                _raise_in(this, _Alarm)

    watcher = threading.Thread(target=watch, daemon=True, name="cpu-limit")
    try:
        watcher.start()
        yield
    except _Alarm:
        raise TooLong from None
    finally:
        while True:
            try:
                ended.set()
                watcher.join()
                _raise_in(this, None)  # what was raised, but has not arrived
                break
            except _Alarm:  # it arrived here
                continue


def _raise_in(thread: int, error: type[BaseException] | None) -> None:
    """Raise an error in a thread, before its next instruction; None takes it back."""
    given = None if error is None else ctypes.py_object(error)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), given)


def _ignore(_what: str) -> None:
    """Do nothing."""


_tell: Callable[[str], None] = _ignore
_now = ""


def tell_what_is_done(tell: Callable[[str], None]) -> None:
    """Call `tell` with each activity that begins, and with the outer one when it has ended."""
    global _tell
    _tell = tell


@contextmanager
def doing(what: str) -> Iterator[None]:
    """Name the block's activity, for the message if the job is ended in it.

    Raises InputRefused if a library written in Rust panics in the block.
    """
    global _now
    around, _now = _now, what
    _tell(what)
    try:
        yield
    except BaseException as error:
        if refused := of_panic(error, what):
            raise refused from None
        raise
    finally:
        _now = around
        _tell(around)


def job_seconds(size: int, *, per_gb: float = _PER_GB, tokens: int = 0) -> int:
    """Return the time limit in seconds of a job on `size` bytes of weights; 0 for no limit.

    Half an hour, plus per GB at least thirty times what was measured (benchmarks/README.md);
    `tokens` is how many a model reads and writes in sequence. WEIGHTSMITH_JOB_SECONDS overrides
    this. Raises UsageError if it is not a whole number.
    """
    if (chosen := chosen_seconds()) is not None:
        return chosen
    return _LEAST + int(size / 1e9 * (per_gb + tokens * _PER_TOKEN))


def chosen_seconds() -> int | None:
    """Return the value of WEIGHTSMITH_JOB_SECONDS, None if not set; UsageError as above."""
    text = os.environ.get(VARIABLE, "").strip()
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= _DIGITS):
        raise UsageError(
            f"{VARIABLE} is not a number of seconds: {text!r}",
            hint="give a whole number, or 0 for no limit",
        )
    return int(text)


def within(seconds: float, call: Callable[[], _T], hint: str) -> _T:
    """Return what a call returns; EnvironmentFailure with the hint if it takes longer.

    The thread that runs it cannot be stopped, but it does not keep the process alive.
    """
    found: list[_T] = []
    raised: list[BaseException] = []

    def run() -> None:
        try:
            found.append(call())
        except BaseException as error:  # noqa: BLE001 - raised below, in the caller's thread
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True, name="within")
    thread.start()
    thread.join(seconds)
    if raised:
        raise raised[0]
    if not found:
        raise EnvironmentFailure(f"no answer within {seconds:g} s", hint=hint)
    return found[0]
