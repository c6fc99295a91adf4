"""Sends progress, notes and the result to the control plane, as JSON lines on standard output."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from typing import TextIO

from weightsmith.core.values import JsonValue, plain

Report = Callable[[int, int, str], None]
"""Report work done: done, total, unit."""


class Wire:
    """Owns the original standard output, so that nothing but JSON lines goes there."""

    def __init__(self) -> None:
        self._file: TextIO = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
        # What C libraries print must not mix with the JSON lines either.
        os.dup2(2, 1)
        self._last = 0.0

    def send(self, message: Mapping[str, JsonValue]) -> None:
        """Write one JSON line."""
        self._file.write(json.dumps(plain(message), ensure_ascii=False) + "\n")

    def progress(self, done: int, total: int, unit: str) -> None:
        """Report work done, at most ten times a second."""
        now = time.monotonic()
        if done >= total or now - self._last >= 0.1:
            self._last = now
            self.send({"progress": [done, total, unit]})

    def doing(self, what: str) -> None:
        """Say what the job is doing; the error of a job that takes too long quotes it."""
        self.send({"doing": what})


_wire: Wire | None = None


def open_wire() -> Wire:
    """Reserve standard output for JSON from now on; `note` and `warn` write there."""
    global _wire
    _wire = Wire()
    return _wire


def note(text: str) -> None:
    """Show the user one line; code that runs in a job may call this."""
    if _wire is not None:
        _wire.send({"note": text})


def warn(text: str) -> None:
    """Show the user one warning, kept for the report; code that runs in a job may call this."""
    if _wire is not None:
        _wire.send({"warn": text})
