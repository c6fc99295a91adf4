"""`python -m weightsmith.fleets.node_program`: a request of a fleet on stdin, a reply on stdout."""

from __future__ import annotations

import os
import signal
import socket
import stat
import sys
import threading
import time
import traceback
from dataclasses import replace
from typing import TYPE_CHECKING

from weightsmith.core.interrupts import interruptible, leave_quietly

if TYPE_CHECKING:  # imported once Ctrl-C is taken care of
    from weightsmith.fleets.requests import TaskReply, TaskRequest

_PATIENCE = 10.0
"""Seconds to clean up, before it ends anyway."""


def main() -> int:
    """Read a request, do it, and print the reply; the exit code is 0 whenever there is a reply."""
    leave_quietly()
    from weightsmith.core.escape import as_json
    from weightsmith.core.safe_parse import RECORD, parse
    from weightsmith.fleets.requests import Failure, TaskReply, TaskRequest

    text = sys.stdin.buffer.readline()
    if text.strip() == b"version":
        from weightsmith.fleets.requests import version

        print(version())  # noqa: T201
        return 0
    try:
        request = TaskRequest.from_json(parse(text, largest=RECORD))
    except ValueError as error:
        sys.stderr.write(f"this is no request of a fleet: {error}\n")
        return 2
    if stat.S_ISFIFO(os.fstat(0).st_mode):
        threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        with interruptible():
            reply = _answer(request)
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # noqa: BLE001 - the last frame reports it with its traceback
        traceback.print_exc()
        what = f"unexpected {type(error).__name__}: {error}"
        failure = Failure(message=what, hint="this is a bug in weightsmith", exit_code=1)
        reply = TaskReply.of_failure(request.id, socket.gethostname(), failure)
    reply = replace(reply, cpu_seconds=round(sum(os.times()[:4]), 3))  # of this whole process
    # In ASCII: whatever the locale is, and without characters at which a reader could split it.
    sys.stdout.write(as_json(reply.to_json()) + "\n")
    sys.stdout.flush()
    return 0


def _answer(request: TaskRequest) -> TaskReply:
    from weightsmith.building.progress import PlainProgress
    from weightsmith.building.wiring import open_tools
    from weightsmith.core.errors import EnvironmentFailure, WeightsmithError, of_machine
    from weightsmith.fleets.node import answer
    from weightsmith.fleets.requests import Failure, TaskReply
    from weightsmith.recipe.user_config import TRUSTED, RunOptions

    asked = dict(request.tools)
    upload_seconds = float(asked.pop("upload_seconds", 0.0))
    trusted = {name: str(asked.pop(name)) for name in TRUSTED if name in asked}
    try:
        with open_tools(
            RunOptions(**asked),
            PlainProgress(sys.stderr),
            upload_seconds=upload_seconds,
            trusted=trusted,
        ) as tools:
            reply = answer(request, tools)
        # Only now: uploads have gone on until here.
        return replace(reply, bytes_moved=reply.bytes_moved + tools.moved())
    except WeightsmithError as error:  # before the task began: its fault is this machine's
        failure = replace(Failure.of(error), exit_code=EnvironmentFailure.exit_code)
    except OSError as error:
        if (refused := of_machine(error)) is None:
            raise
        failure = Failure.of(refused)
    return TaskReply.of_failure(request.id, socket.gethostname(), failure)


def _end_with_parent() -> None:
    """End as on SIGTERM when standard input closes: who asked is gone then."""
    while os.read(0, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_PATIENCE)
    os._exit(130)


if __name__ == "__main__":
    sys.exit(main())
