"""The `weightsmith` program: the same commands as `invoke`, wherever the package is installed."""

from __future__ import annotations

import sys

from invoke.program import Program

from toolchain import __version__
from toolchain.cli import namespace
from toolchain.cli.command import print_error
from toolchain.errors import EnvironmentFailure


def main() -> None:
    """Run the command line and exit with its code."""
    try:
        Program(name="weightsmith", version=__version__, namespace=namespace).run()
    except KeyboardInterrupt:  # before a command began; commands handle it themselves
        sys.exit(130)
    except NotADirectoryError as error:  # Invoke looks for its settings in the home folder
        wrong = EnvironmentFailure(
            f"cannot read {error.filename}: {error.strerror}", hint="set HOME"
        )
        print_error(wrong, as_json="--json" in sys.argv)
        sys.exit(wrong.exit_code)


if __name__ == "__main__":
    main()
