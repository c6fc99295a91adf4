"""A progress that keeps what people are told."""

from __future__ import annotations

from weightsmith.ports import Silent


class Told(Silent):
    """Keeps notes and warnings, in order."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)

    warn = note
