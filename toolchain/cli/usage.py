"""What Invoke's parser cannot read, answered as all other errors are: a hint, exit code 2, JSON."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable

from invoke.exceptions import ParseError
from invoke.program import Program

from toolchain.cli.command import tell_error
from toolchain.errors import UsageError

_HELP = frozenset({"--help", "-h"})


def answer_usage() -> None:
    """Change Invoke's `Program`, once, for `invoke` and `weightsmith` alike.

    Invoke itself ends with 1 where a flag is wrong, which means a fault of ours, and takes the
    `--help` of a command with positional arguments for the first of them.
    """
    for step in ("parse_core", "parse_tasks", "parse_cleanup"):
        setattr(Program, step, _answered(getattr(Program, step)))


def _answered(step: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(step)
    def run(program: Program, *given: object) -> None:
        try:
            if step.__name__ == "parse_tasks":
                _ask_for_help(program)
            step(program, *given)
        except ParseError as error:
            command = getattr(error.context, "name", None)
            ask = f"--help {command}` has its flags" if command else "--list` has the commands"
            wrong = UsageError(str(error), hint=f"`{program.called_as} {ask}")
            tell_error(wrong, as_json="--json" in program.argv)
            sys.exit(wrong.exit_code)

    return run


def _ask_for_help(program: Program) -> None:
    """Read `COMMAND … --help` as `--help COMMAND`."""
    words = program.core.unparsed
    if _HELP.intersection(words) and not words[0].startswith("-"):
        program.core[0].args.help.value, program.core.unparsed = words[0], []
