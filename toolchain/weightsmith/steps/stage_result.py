"""A stage's return value, with its duration and whether it was cached."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from weightsmith.steps.tools import Tools

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageResult(Generic[T_co]):
    """A stage's value, whether it was cached, and its duration in seconds."""

    stage: str
    """Its name in the record; "" for what is no stage of its own, and not recorded."""
    value: T_co
    cached: bool
    seconds: float


def unrecorded(value: T) -> StageResult[T]:
    """Return what took no stage of its own."""
    return StageResult(stage="", value=value, cached=True, seconds=0.0)


class Timer:
    """Reports the start of a stage when created, and later its end."""

    def __init__(self, stage: str, detail: str, tools: Tools) -> None:
        self._stage, self._tools = stage, tools
        tools.progress.stage(stage, detail)
        self._began = tools.clock()

    def done(self, value: T, *, cached: bool, elsewhere: float = 0.0) -> StageResult[T]:
        """Return the stage's outcome, and report its end.

        `elsewhere` are seconds that this stage took in another one's time; negative if it was the
        other one that did.
        """
        seconds = round(max(0.0, self._tools.clock() - self._began + elsewhere), 3)
        self._tools.progress.finish(self._stage, seconds, cached)
        return StageResult(stage=self._stage, value=value, cached=cached, seconds=seconds)
