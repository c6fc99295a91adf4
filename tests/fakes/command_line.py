"""The command line in this process: a second less than a process of its own, which imports anew."""

from __future__ import annotations

import io
import sys
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from unittest.mock import patch

from weightsmith.cli.program import main


@dataclass(frozen=True)
class Ended:
    """How a command ended, and what it printed."""

    code: int
    out: str
    err: str


def weightsmith(*words: object, env: Mapping[str, str] | None = None) -> Ended:
    """Run a command to its end, with these variables; a traceback is a failure."""
    out, err = io.StringIO(), io.StringIO()
    with (
        patch.object(sys, "argv", ["weightsmith", *map(str, words)]),
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
