"""pip's settings on this machine, from its environment variables and files."""

from __future__ import annotations

import ast
import contextlib
import sys

from weightsmith.drivers import process
from weightsmith.errors import EnvironmentFailure

_SECTIONS = ("global", "install", ":env:")
"""Sections of options for `pip install`; the last one with the option wins."""
_SECONDS = 60


def pip_settings(name: str) -> tuple[str, ...]:
    """Return a pip option such as `index-url` from each section that sets it, the strongest last.

    Empty without pip. https://pip.pypa.io/en/stable/topics/configuration/
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
    keys = (f"{section}.{name}" for section in _SECTIONS)
    return tuple(found[key] for key in keys if key in found)


def pip_setting(name: str) -> str:
    """Return pip's value of an option; empty if nothing sets it."""
    return next(reversed(pip_settings(name)), "")
