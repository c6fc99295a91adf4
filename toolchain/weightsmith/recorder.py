"""Collects the warnings of a build for its record."""

from __future__ import annotations

from weightsmith.ports import Progress


class Recorder:
    """Passes everything on and collects the warnings for the report."""

    def __init__(self, inner: Progress) -> None:
        self._inner = inner
        self.warnings: list[str] = []
        self.stage = inner.stage
        self.advance = inner.advance
        self.finish = inner.finish
        self.note = inner.note

    def warn(self, text: str) -> None:
        """Keep the warning and show it."""
        if text not in self.warnings:
            self.warnings.append(text)
            self._inner.warn(text)
