"""The `weightsmith` program, and `python -m weightsmith`."""

import os
import sys

from weightsmith.core.interrupts import leave_quietly


def main() -> None:
    """Run the command line; what it imports comes after Ctrl-C is taken care of."""
    leave_quietly()
    _spell_paths()
    from weightsmith.cli.program import main as run

    run()


def _spell_paths() -> None:
    """Start again in UTF-8 where Python was told to take names of files as ASCII.

    Else a path with other letters is no path: a recipe's is not found, and no job can be given one.
    """
    if sys.getfilesystemencoding() == "ascii" and not sys.flags.utf8_mode:
        os.environ["PYTHONUTF8"] = "1"  # also for jobs
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])  # noqa: S606


if __name__ == "__main__":
    main()
