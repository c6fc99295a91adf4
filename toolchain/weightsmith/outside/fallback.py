"""The `auto` runner: the container engine if it can make the builder, else this machine.

Both give the same bytes, so a build may mix them, with a warning: failing would make a registry
mirror a condition of the first image.
"""

from __future__ import annotations

from collections.abc import Mapping

from weightsmith.core.errors import EnvironmentFailure
from weightsmith.core.jobs import Job
from weightsmith.core.ports import Progress, Runner
from weightsmith.core.values import JsonValue

_LONG = 160
"""Characters of a reason; the middle of a longer one is cut."""


class FallbackRunner:
    """Uses the first runner, or the second for builders that the first cannot make.

    Both give the same bytes, so a build may mix them. A failed job is never retried, since it
    would fail the same way.
    """

    def __init__(self, first: Runner, second: Runner) -> None:
        self._first = first
        self._second = second
        self.name = first.name
        self._chosen: dict[str, Runner] = {}

    def prepare(self, builder: str, progress: Progress) -> None:
        """Prepare the builder in the first runner that can."""
        if builder in self._chosen:
            return
        try:
            self._first.prepare(builder, progress)
        except EnvironmentFailure as error:
            progress.warn(
                f"the {self._first.name} runner cannot make the builder {builder!r}, so the "
                f"{self._second.name} runner runs its jobs: {_first_and_last(error.message)}"
            )
            self._second.prepare(builder, progress)
            self._chosen[builder] = self._second
        else:
            self._chosen[builder] = self._first

    @property
    def networked(self) -> bool:
        """Say whether any job had network access."""
        return self._first.networked or self._second.networked

    def check(self, builder: str) -> None:
        """Check nothing in advance: either runner may be able to make the builder."""

    def ready(self, builder: str) -> bool:
        """Say whether either runner has the builder."""
        return self._first.ready(builder) or self._second.ready(builder)

    def run(
        self, job: Job, progress: Progress, *, stop: int | None = None
    ) -> Mapping[str, JsonValue]:
        """Run the job in the runner that has its builder."""
        self.prepare(job.builder, progress)
        return self._chosen[job.builder].run(job, progress, stop=stop)


def _first_and_last(message: str) -> str:
    """Return the first line, which names what failed, and the last, which says why."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    why = lines[-1] if lines[1:] else ""
    if len(why) > _LONG:
        why = f"{why[: _LONG // 2]} … {why[-_LONG // 2 :]}"
    return f"{lines[0]} {why}".rstrip()
