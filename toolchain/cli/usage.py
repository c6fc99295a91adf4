"""What Invoke's parser cannot read, answered as all other errors are: a hint, exit code 2, JSON."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable

from invoke.exceptions import Exit, ParseError
from invoke.parser.parser import ParseMachine
from invoke.program import Program

from toolchain.cli.command import print_error
from toolchain.errors import UsageError

_HELP = frozenset({"--help", "-h"})


def answer_usage() -> None:
    """Change Invoke's `Program`, once, for `invoke` and `weightsmith` alike.

    Invoke itself ends with 1 where a flag is wrong, which means a fault of ours, takes the
    `--help` of a command with positional arguments for the first of them, and leaves out a flag
    that may be repeated where its value is missing.
    """
    ParseMachine.complete_flag = _require_value
    for step in ("parse_core", "parse_tasks", "parse_cleanup"):
        setattr(Program, step, _answered(getattr(Program, step)))


def _answered(step: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(step)
    def run(program: Program, *given: object) -> None:
        try:
            if step.__name__ == "parse_tasks":
                _ask_for_help(program)
            step(program, *given)
        except (ParseError, Exit, ValueError) as error:  # the last for a number that is none
            if isinstance(error, Exit) and not error.message:  # it has shown what was asked for
                raise
            command = getattr(getattr(error, "context", None), "name", None)
            ask = f"--help {command}` has its flags" if command else "--list` has the commands"
            wrong = UsageError(_text(error), hint=f"`{program.called_as} {ask}")
            print_error(wrong, as_json="--json" in program.argv)
            sys.exit(wrong.exit_code)
        except BrokenPipeError:  # the reader of a list, such as `head`, had enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(0)

    return run


def _text(error: Exception) -> str:
    if isinstance(error, ValueError):  # int()'s own, which ends in what it was given
        return f"{str(error).rpartition(': ')[2]}: a whole number is expected"
    return str(error)


_complete_flag = ParseMachine.complete_flag


def _require_value(machine: ParseMachine) -> None:
    flag = machine.flag
    if flag and flag.takes_value and not flag.optional:
        given = machine.flag_got_value if flag.kind is list else flag.raw_value is not None
        if not given:
            raise ParseError(f"--{flag.names[0]} takes a value", machine.context)
    _complete_flag(machine)


def _ask_for_help(program: Program) -> None:
    """Read `COMMAND … --help` as `--help COMMAND`."""
    words = program.core.unparsed
    if _HELP.intersection(words) and not words[0].startswith("-"):
        program.core[0].args.help.value, program.core.unparsed = words[0], []
