"""The command line in this process: a second less than a process of its own, which imports anew."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import chdir, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from weightsmith.cli import namespace
from weightsmith.cli.commands import report_words
from weightsmith.cli.program import main

from tests.paths import ROOT

PROGRAMS = {
    "weightsmith": [sys.executable, "-m", "weightsmith"],
    "invoke": [sys.executable, "-m", "invoke", "--search-root", str(ROOT)],
}


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str


def weightsmith(*words: object, env: Mapping[str, str] | None = None) -> Ended:
    """Run a command to its end, with these variables; a traceback is a failure."""
    out, err = io.StringIO(), io.StringIO()
    argv = ["weightsmith", *map(str, words)]
    with (
        patch.object(sys, "argv", argv),
        # A program reads them once, when it imports its commands.
        patch.object(namespace["report"], "positional", report_words(argv)),
        patch.dict("os.environ", env or {}),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        try:
            main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
    assert "Traceback" not in err.getvalue()
    return Ended(code, out.getvalue(), err.getvalue())


def run(*words: object, **environment: str) -> Ended:
    """Run a command in this process, in the project's folder."""
    with chdir(ROOT):
        return weightsmith(*words, env=environment)


def told(*words: object, store: Path | None = None, code: int = 0) -> dict[str, Any]:
    """What a command, run so, prints with --json; with a store of its own."""
    done = run(*words, "--json", **({"WEIGHTSMITH_STORE": str(store)} if store else {}))
    assert done.code == code, done.err[-3000:]
    found: dict[str, Any] = json.loads(done.out)
    return found


def started(program: str, *words: str, **environment: str) -> Ended:
    """Run a command as a program of its own, in the project's folder."""
    done = subprocess.run(
        [*PROGRAMS[program], *words], cwd=ROOT, env={**os.environ, **environment},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return Ended(done.returncode, done.stdout, done.stderr)
