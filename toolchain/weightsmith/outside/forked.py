"""Runs a function in a copy of this process, which has what was imported so far."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from weightsmith.core.errors import (
    EnvironmentFailure,
    WeightsmithError,
    from_code,
    of_panic,
    ran_out_of_memory,
)
from weightsmith.core.safe_parse import parse
from weightsmith.outside.process import describe_exit

_SET_DEATH_SIGNAL = 1
"""Of <sys/prctl.h>."""
_NO_MEMORY = "no memory"


@dataclass(slots=True)
class Forked:
    """A copy of this process that does some work."""

    pid: int
    what: str
    _answer: int
    """Open file, at whose end the copy has ended; it has the work's error."""

    def join(self) -> None:
        """Wait until the work is done, once.

        Raises the WeightsmithError that it raised, MemoryError if it lacked memory or was killed,
        EnvironmentFailure if it ended otherwise; then its traceback is on standard error.
        """
        with os.fdopen(os.dup(self._answer), "rb") as answer:
            said = answer.read().decode()
        pid, self.pid = self.pid, 0
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if code == -signal.SIGKILL or said == _NO_MEMORY:
            raise MemoryError(self.what)
        if said:
            message, hint = parse(said)
            raise from_code(code, message, hint)
        if code:
            raise EnvironmentFailure(
                f"{self.what} failed ({describe_exit(code)})",
                hint="the job's log has the traceback",
            )


@contextlib.contextmanager
def forked(work: Callable[[], object], what: str) -> Iterator[Forked]:
    """Do `work` in a copy of this process, which ends with the block or with this process.

    Call it before other threads are started: the copy has none of them, but their locks.
    """
    reading, writing = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    pid = os.fork()
    if not pid:
        _run(work, what, parent, writing)
    os.close(writing)
    copy = Forked(pid, what, reading)
    try:
        yield copy
    finally:
        os.close(reading)
        if copy.pid:
            os.kill(copy.pid, signal.SIGKILL)
            os.waitpid(copy.pid, 0)


def _run(work: Callable[[], object], what: str, parent: int, answer: int) -> None:
    """Do the work and exit."""
    code, said = 1, ""
    try:
        ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)
        work()
        code = 0
    except WeightsmithError as error:
        code, said = error.exit_code, json.dumps([error.message, error.hint])
    except BaseException as error:  # noqa: BLE001 - nothing of the copy may run on
        traceback.print_exc()
        said = _NO_MEMORY if ran_out_of_memory(error) else ""
        if refused := of_panic(error, what):
            code, said = refused.exit_code, json.dumps([refused.message, refused.hint])
    with contextlib.suppress(OSError):
        os.write(answer, said.encode())
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
