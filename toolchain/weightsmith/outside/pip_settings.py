"""pip's settings on this machine, from its environment variables and files."""

from __future__ import annotations

import ast
import contextlib
import sys
from collections.abc import Mapping
from functools import cached_property

from weightsmith.core.errors import EnvironmentFailure
from weightsmith.outside import process

_SECTIONS = ("global", "install", ":env:")
"""Sections of options for `pip install`; the last one with the option wins."""
_SECONDS = 60


class PipSettings:
    """pip's settings at the moment in which the first is asked for; pip itself is asked once.

    https://pip.pypa.io/en/stable/topics/configuration/
    """

    def every(self, name: str) -> tuple[str, ...]:
        """Return an option such as `index-url` from each section that sets it, strongest last.

        Empty without pip.
        """
        keys = (f"{section}.{name}" for section in _SECTIONS)
        return tuple(self._listed[key] for key in keys if key in self._listed)

    def get(self, name: str) -> str:
        """Return the value of an option; empty if nothing sets it."""
        return next(reversed(self.every(name)), "")

    @cached_property
    def _listed(self) -> Mapping[str, str]:
        """Return what `pip config list` prints; starting it takes a third of a second."""
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
            return {}
        return found
