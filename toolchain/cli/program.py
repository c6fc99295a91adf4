"""The `weightsmith` program: the same commands as `invoke`, wherever the package is installed."""

from __future__ import annotations

import os
import sys

from invoke.exceptions import ParseError
from invoke.program import Program

from toolchain import __version__
from toolchain.cli import namespace


class _Program(Program):  # type: ignore[misc]  # invoke has no types
    def parse_tasks(self) -> None:
        try:
            super().parse_tasks()
        except ParseError as error:
            print(f"error: {error}", file=sys.stderr)  # noqa: T201
            sys.exit(2)


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
