"""How programs download here: tried again if a connection broke, and with pip's settings."""

from __future__ import annotations

import ast
import contextlib
import re
import sys
import time
from collections.abc import Callable, Mapping
from functools import cached_property

from weightsmith.core.errors import EnvironmentFailure
from weightsmith.core.ports import Progress
from weightsmith.outside import process
from weightsmith.outside.process import Completed

PAUSES = (5.0, 20.0)
"""Seconds before the second and the third try."""
_BROKE = re.compile(
    r"broke off|Connection broken:|IncompleteRead|Read timed out|read operation timed out"
    r"|Connection reset|RemoteDisconnected|not enough bytes|unexpected EOF|TLS handshake timeout"
    r"|HTTP [Ee]rror 50\d|Service Unavailable|Bad Gateway|Gateway Time-?out"
    # Some take a truncated download for complete until they hash it.
    r"|DO NOT MATCH THE HASHES|broken or not the published file|Hash Sum mismatch|unexpected size"
)
"""How pip, apt, BuildKit and our own scripts report a connection that broke."""


def persistently(run: Callable[[], Completed], progress: Progress) -> Completed:
    """Run a program that downloads, up to three times if a connection broke.

    An unreachable server is not retried here: the programs do that themselves.
    """
    for pause in PAUSES:
        done = run()
        broken = next((line for line in reversed(done.tail) if _BROKE.search(line)), "")
        if done.returncode == 0 or not broken:
            return done
        progress.warn(f"a download failed; trying again in {pause:g} s: {broken.strip()[:200]}")
        time.sleep(pause)
    return run()


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
