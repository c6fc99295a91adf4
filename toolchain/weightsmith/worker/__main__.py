"""Reads a job, runs it, and sends the result or the error."""

from __future__ import annotations

import errno
import faulthandler
import os
import stat
import sys
import threading
import traceback
from pathlib import Path

from weightsmith.core.errors import (
    EnvironmentFailure,
    InputRefused,
    WeightsmithError,
    of_limits,
    of_panic,
    ran_out_of_memory,
    too_many_processes,
)
from weightsmith.core.jobs import Job, out_of_memory, read_job
from weightsmith.core.time_limits import tell_what_is_done
from weightsmith.core.values import JsonValue
from weightsmith.forward.libraries import import_for_good
from weightsmith.merging.libc import keep_freed_memory
from weightsmith.worker.jobs import LIBRARIES, STAGES
from weightsmith.worker.virtual import computed
from weightsmith.worker.wire import Wire, open_wire

PARENT_GONE = 130
_KEPT = 192 << 20
"""Bytes freed by one layer that a model keeps for the next: with a third of it, each layer of all
questions at once gave memory back and got it again."""


def run_job(job: Job, wire: Wire) -> int:
    """Run the job, send its result or error, and return the exit code."""
    try:
        if job.kind in LIBRARIES:
            keep_freed_memory(_KEPT)
            import_for_good(*LIBRARIES[job.kind])
        with computed(job):
            result = STAGES[job.kind](job, wire.progress)
    except WeightsmithError as error:
        return _send_error(wire, of_limits(error) or error)
    except Exception as problem:  # noqa: BLE001 - the last frame reports it with its traceback
        traceback.print_exc()
        if ran_out_of_memory(problem):
            return _send_error(wire, out_of_memory(job))
        if limited := of_limits(problem) or too_many_processes(str(problem)):
            return _send_error(wire, limited)
        # shutil raises several failures as one error without a number.
        full = getattr(problem, "errno", 0) in (errno.ENOSPC, errno.EDQUOT)
        if isinstance(problem, OSError) and (full or os.strerror(errno.ENOSPC) in str(problem)):
            place = problem.filename or job.output
            failure = EnvironmentFailure(
                f"the disk is full while the {job.kind} job writes to {place}",
                hint="free some space on that disk, or write to a larger one: give another --out, "
                "or if it is the store, set WEIGHTSMITH_STORE (`invoke clean --keep 0` empties it)",
            )
            return _send_error(wire, failure)
        what = f"unexpected {type(problem).__name__} in the {job.kind} job: {problem}"
        return _send_error(wire, WeightsmithError(what, hint="the traceback is in the job's log"))
    except BaseException as problem:
        if refused := too_many_processes(str(problem)) or of_panic(problem, f"the {job.kind} job"):
            return _send_error(wire, refused)
        raise
    wire.send({"result": result})
    return 0


def _send_error(wire: Wire, error: WeightsmithError) -> int:
    report: dict[str, JsonValue] = {
        "message": error.message,
        "hint": error.hint,
        "exit_code": error.exit_code,
    }
    wire.send({"error": report})
    return error.exit_code


def end_with_parent() -> None:
    """Exit as soon as standard input closes, if it is a pipe."""

    def watch() -> None:
        while os.read(0, 1024):
            pass
        os._exit(PARENT_GONE)

    kind = os.fstat(0).st_mode
    if stat.S_ISFIFO(kind) or stat.S_ISSOCK(kind):
        threading.Thread(target=watch, daemon=True).start()


def main(arguments: list[str]) -> int:
    """Run the job of the given file; return the exit code."""
    if len(arguments) != 1:
        print("usage: python -m weightsmith.worker job.json", file=sys.stderr)  # noqa: T201
        return 2
    end_with_parent()
    wire = open_wire()
    try:
        job = read_job(Path(arguments[0]).read_text("utf-8"))
    except ValueError as problem:
        hint = "builder and control plane must have the same version"
        return _send_error(
            wire, InputRefused(f"invalid job for this builder: {problem}", hint=hint)
        )
    tell_what_is_done(wire.doing)
    if job.seconds:
        # If the job hangs, log every thread's stack before the runner stops it.
        faulthandler.dump_traceback_later(job.seconds * 0.8, exit=False)
    return run_job(job, wire)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # Libraries' threads may still end; tearing the process down beside them can crash it.
    os._exit(code)
