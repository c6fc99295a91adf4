"""A stage's return value, with its duration and whether it was cached."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from weightsmith.tools import Tools

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome(Generic[T]):
    """A stage's value, whether it was cached, and its duration in seconds."""

    stage: str
    value: T
    cached: bool
    seconds: float


class Timer:
    """Reports the start of a stage when created, and later its end."""

    def __init__(self, stage: str, detail: str, tools: Tools) -> None:
        self._stage, self._tools = stage, tools
        tools.progress.stage(stage, detail)
        self._began = tools.clock()

    def done(self, value: T, *, cached: bool) -> Outcome[T]:
        """Return the stage's outcome, and report its end."""
        seconds = round(self._tools.clock() - self._began, 3)
        self._tools.progress.finish(self._stage, seconds, cached)
        return Outcome(stage=self._stage, value=value, cached=cached, seconds=seconds)
