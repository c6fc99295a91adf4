"""The line to the control plane: progress, notes and the result, as JSON on standard output."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from typing import TextIO

from weightsmith.values import Json, plain

Report = Callable[[int, int, str], None]
"""Report work done: done, total, unit."""


class Wire:
    """The line to the control plane: the original standard output, kept for JSON alone."""

    def __init__(self) -> None:
        self._file: TextIO = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
        # Also what C libraries print must not get between the JSON lines.
        os.dup2(2, 1)
        self._last = 0.0

    def send(self, message: Mapping[str, Json]) -> None:
        """Write one JSON line."""
        self._file.write(json.dumps(plain(message), ensure_ascii=False) + "\n")

    def progress(self, done: int, total: int, unit: str) -> None:
        """Report work done, ten times a second at most."""
        now = time.monotonic()
        if done >= total or now - self._last >= 0.1:
            self._last = now
            self.send({"progress": [done, total, unit]})

    def doing(self, what: str) -> None:
        """Say what is being done, for the message of a job that is ended in it."""
        self.send({"doing": what})


_wire: Wire | None = None


def open_wire() -> Wire:
    """Keep standard output for JSON from now on; `note` and `warn` go there too."""
    global _wire
    _wire = Wire()
    return _wire


def note(text: str) -> None:
    """Say one line to the user; a stage may import this."""
    if _wire is not None:
        _wire.send({"note": text})


def warn(text: str) -> None:
    """Say one warning line to the user, kept for the report; a stage may import this."""
    if _wire is not None:
        _wire.send({"warn": text})
