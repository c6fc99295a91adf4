"""The `weightsmith` program: the same commands as `invoke`, wherever the package is installed."""

from __future__ import annotations

import os
import sys

from invoke.program import Program

from toolchain import __version__
from toolchain.cli import namespace


def main() -> None:
    """Run the command line and exit with its code."""
    try:
        Program(name="weightsmith", version=__version__, namespace=namespace).run()
    except KeyboardInterrupt:  # before a command began; commands handle it themselves
        sys.exit(130)
    except BrokenPipeError:  # the reader, such as `head`, had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
