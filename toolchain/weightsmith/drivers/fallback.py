"""The `auto` runner: the container engine where its builders can be made, else this machine."""

from __future__ import annotations

from collections.abc import Mapping

from weightsmith.errors import EnvironmentFailure
from weightsmith.jobs import Job
from weightsmith.ports import Progress, Runner
from weightsmith.values import Json

_LONG = 160
"""Characters of a reason; its beginning and its end say most."""


class FallbackRunner:
    """Uses the first runner, and the second for builders that the first cannot make.

    Both make the same bytes, so a build may well mix them. A job's own failure is never retried:
    it would fail the same way.
    """

    def __init__(self, first: Runner, second: Runner) -> None:
        self._first = first
        self._second = second
        self.name = first.name
        self._chosen: dict[str, Runner] = {}

    def prepare(self, builder: str, progress: Progress) -> None:
        """Make the builder ready in the first runner that can."""
        if builder in self._chosen:
            return
        try:
            self._first.prepare(builder, progress)
        except EnvironmentFailure as error:
            progress.warn(
                f"the {self._first.name} runner cannot make the builder {builder!r}, so the "
                f"{self._second.name} runner does its jobs: {_first_and_last(error.message)}"
            )
            self._second.prepare(builder, progress)
            self._chosen[builder] = self._second
        else:
            self._chosen[builder] = self._first

    @property
    def networked(self) -> bool:
        """Say whether a job of either had the network."""
        return self._first.networked or self._second.networked

    def check(self, builder: str) -> None:
        """Refuse nothing beforehand: one runner may be able to make what the other cannot."""

    def ready(self, builder: str) -> bool:
        """Say whether one of the two has the builder."""
        return self._first.ready(builder) or self._second.ready(builder)

    def run(self, job: Job, progress: Progress) -> Mapping[str, Json]:
        """Run the job where its builder is."""
        self.prepare(job.builder, progress)
        return self._chosen[job.builder].run(job, progress)


def _first_and_last(message: str) -> str:
    """Return what failed and, of a program's log below it, the last line: it says why."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    why = lines[-1] if lines[1:] else ""
    if len(why) > _LONG:
        why = f"{why[: _LONG // 2]} … {why[-_LONG // 2 :]}"
    return f"{lines[0]} {why}".rstrip()
