"""Runs a program of the user's in the user's own environment."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence

from weightsmith.core.errors import CheckFailed
from weightsmith.core.escape import passed_on
from weightsmith.outside import process

_OUTPUT_BYTES = 64 << 20


def run_command(
    argv: Sequence[str], environment: Mapping[str, str], stdin: bytes, seconds: float
) -> str:
    """Return the program's standard output; its standard error is passed on.

    Unlike our own programs it keeps the user's whole environment, including tokens. Raises
    CheckFailed for an exit code other than 0, too much output or too long a run;
    EnvironmentFailure if the program does not exist.
    """
    lines: list[str] = []
    size = 0

    def keep(line: str) -> None:
        nonlocal size
        size += len(line)
        if size > _OUTPUT_BYTES:
            raise CheckFailed(
                f"{argv[0]} printed more than {_OUTPUT_BYTES} bytes",
                hint="print one JSON object on standard output, and the rest on standard error",
            )
        lines.append(line)

    try:
        done = process.run(
            argv,
            env={**os.environ, **environment},
            input=stdin,
            on_line=keep,
            on_error_line=lambda line: print(passed_on(line), file=sys.stderr, flush=True),  # noqa: T201
            timeout=seconds,
        )
    except process.TookTooLong as error:
        raise CheckFailed(error.message, hint="give it fewer questions") from None
    if done.returncode != 0:
        # Of a traceback, only the last line.
        lines = [line for line in done.tail if line.strip() and not line[0].isspace()]
        last = "\n".join(f"  {line}" for line in lines[-4:])
        raise CheckFailed(
            f"{argv[0]} failed ({process.describe_exit(done.returncode)})"
            + (f":\n{last}" if last else ""),
            hint="run it by hand; it must exit with 0 whatever the score",
        )
    return "\n".join(lines)
