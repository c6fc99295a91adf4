"""pip's settings on this machine, from its variables or its files."""

from __future__ import annotations

import ast
import contextlib
import sys

from weightsmith.drivers import process
from weightsmith.errors import EnvironmentFailure

_PLACES = ("global", "install", ":env:")
"""Where pip takes options of `pip install` from; the last one that has it counts."""
_SECONDS = 60


def pip_settings(name: str) -> tuple[str, ...]:
    """Return an option of pip such as `index-url` from each place that sets it, the strongest last.

    Empty where there is no pip. https://pip.pypa.io/en/stable/topics/configuration/
    """
    found: dict[str, str] = {}

    def keep(line: str) -> None:
        key, _, value = line.partition("=")
        with contextlib.suppress(ValueError, SyntaxError):
            found[key] = str(ast.literal_eval(value))

    try:
        process.run(
            [sys.executable, "-m", "pip", "config", "list"],
            env=process.scrubbed(prefixes=("PIP_", "XDG_")),
            on_line=keep,
            on_error_line=lambda _: None,
            timeout=_SECONDS,
        )
    except EnvironmentFailure:
        return ()
    keys = (f"{place}.{name}" for place in _PLACES)
    return tuple(found[key] for key in keys if key in found)


def pip_setting(name: str) -> str:
    """Return what pip would take an option for; empty where nothing sets it."""
    return next(reversed(pip_settings(name)), "")
