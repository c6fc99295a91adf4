"""The `weightsmith` program: the same commands as `invoke`, wherever the package is installed.

It has a program of its own, with exit code 2 and JSON; `invoke` keeps its conventions. Changing
Invoke's parser when our tasks are loaded also changed other people's tasks.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from invoke.exceptions import Exit, ParseError
from invoke.program import Program

from weightsmith import __version__
from weightsmith.cli import namespace
from weightsmith.cli.command import print_error, settle_streams
from weightsmith.core.errors import EnvironmentFailure, UsageError

_HELP = frozenset({"--help", "-h"})


class Weightsmith(Program):  # type: ignore[misc]  # mypy does not follow invoke
    """Invoke's program, which reports wrong flags like all errors: a hint, exit code 2, JSON.

    Invoke itself exits with 1, which means a bug here. It reads `--help` as the first positional
    argument of a command that has one, and ignores a repeatable flag without a value.
    """

    @property
    def called_as(self) -> str:
        """Return what a user types to run this: `python -m weightsmith` for Python's own name."""
        name = str(super().called_as)
        return "python -m weightsmith" if name == "__main__.py" else name

    def parse_core(self, argv: list[str] | None) -> None:
        """Read the program's own options."""
        with self._answered():
            super().parse_core(argv)

    def parse_tasks(self) -> None:
        """Read the command and its flags; `COMMAND … --help` is `--help COMMAND`."""
        with self._answered():
            words = list(self.core.unparsed)
            if _HELP.intersection(words) and not words[0].startswith("-"):
                self.core[0].args.help.value, self.core.unparsed = words[0], []
            super().parse_tasks()
            self._require_values(words)

    def parse_cleanup(self) -> None:
        """Print help or the list of commands, if asked."""
        with self._answered():
            super().parse_cleanup()

    def _require_values(self, words: list[str]) -> None:
        """Raise ParseError for a repeatable flag that is given more often than it has values."""
        lists = [(c, arg) for c in self.tasks for arg in c.args.values() if arg.kind is list]
        for context, argument in lists:
            flags = tuple(f"--{name}" for name in argument.names)
            given = [word for word in words if word.partition("=")[0] in flags]
            # A flag's values are counted in all commands of the line, as its words are.
            values = [len(one.value) for _, one in lists if {*one.names} & {*argument.names}]
            if len(given) > sum(values):
                raise ParseError(f"{flags[0]} takes a value", context)

    @contextmanager
    def _answered(self) -> Iterator[None]:
        try:
            yield
        except (ParseError, Exit, ValueError) as error:  # the last for a text that is not a number
            if isinstance(error, Exit) and not error.message:  # it has shown what was asked for
                raise
            command = getattr(getattr(error, "context", None), "name", None)
            ask = f"--help {command}` has its flags" if command else "--list` has the commands"
            text = str(error)
            if isinstance(error, ValueError):  # int()'s own, which ends in what it was given
                text = f"{text.rpartition(': ')[2]}: expected a whole number"
            _fail(UsageError(text, hint=f"`{self.called_as} {ask}"))
        except BrokenPipeError:  # the reader of a list, such as `head`, had enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(0)


def _fail(error: UsageError | EnvironmentFailure) -> None:
    print_error(error, as_json="--json" in sys.argv)
    sys.exit(error.exit_code)


def main() -> None:
    """Run the command line and exit with its code."""
    settle_streams()  # also for lists and help, which Invoke prints itself
    try:
        Weightsmith(
            name="weightsmith",
            version=__version__,
            namespace=namespace,
            binary_names=["weightsmith"],  # in completion scripts
        ).run()
    except KeyboardInterrupt:  # before a command began; commands handle it themselves
        sys.exit(130)
    except OSError as error:  # Invoke looks for its settings in the home folder
        if error.errno not in (errno.ENOTDIR, errno.ELOOP, errno.EACCES, errno.ENAMETOOLONG):
            raise
        _fail(
            EnvironmentFailure(f"cannot read {error.filename}: {error.strerror}", hint="set HOME")
        )


if __name__ == "__main__":
    main()
