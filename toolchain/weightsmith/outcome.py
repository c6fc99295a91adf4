"""What a stage returns: its value, whether it was cached, and how long it took."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from weightsmith.tools import Tools

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome(Generic[T]):
    """A stage's value, whether nothing had to be done for it, and the seconds that it took."""

    stage: str
    value: T
    cached: bool
    seconds: float


class Timer:
    """Announces a stage when it is made, and its end when the stage is done."""

    def __init__(self, stage: str, detail: str, tools: Tools) -> None:
        self._stage, self._tools = stage, tools
        tools.progress.stage(stage, detail)
        self._began = tools.clock()

    def done(self, value: T, *, cached: bool) -> Outcome[T]:
        """Return the stage's outcome, and say that it ended."""
        seconds = round(self._tools.clock() - self._began, 3)
        self._tools.progress.finish(self._stage, seconds, cached)
        return Outcome(stage=self._stage, value=value, cached=cached, seconds=seconds)
