"""The `weightsmith` program: the same commands as `invoke`, wherever the package is installed."""

from __future__ import annotations

import os
import sys

from invoke.exceptions import ParseError
from invoke.program import Program

from toolchain import __version__
from toolchain.cli import namespace
from toolchain.cli.command import tell_error
from toolchain.errors import UsageError


class _Program(Program):  # type: ignore[misc]  # invoke has no types
    def parse_tasks(self) -> None:
        try:
            super().parse_tasks()
        except ParseError as error:
            command = getattr(error.context, "name", None)
            ask = f"--help {command}` has its flags" if command else "--list` has the commands"
            wrong = UsageError(str(error), hint=f"`weightsmith {ask}")
            tell_error(wrong, as_json="--json" in self.argv)
            sys.exit(wrong.exit_code)


def main() -> None:
    """Run the command line and exit with its code."""
    try:
        _Program(name="weightsmith", version=__version__, namespace=namespace).run()
    except KeyboardInterrupt:  # before a command began; commands handle it themselves
        sys.exit(130)
    except BrokenPipeError:  # the reader, such as `head`, had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
