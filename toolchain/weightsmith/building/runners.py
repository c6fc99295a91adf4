"""Runners around another runner, which change how its jobs run and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from weightsmith.core.jobs import Job
from weightsmith.core.ports import Progress, Runner
from weightsmith.core.values import JsonValue


class Wrapped:
    """A runner that hands everything to another one; what differs overrides `run`."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.name = runner.name

    @property
    def networked(self) -> bool:
        """Whether any job has run with network access."""
        return self.runner.networked

    def prepare(self, builder: str, progress: Progress) -> None:
        """Make the builder ready."""
        self.runner.prepare(builder, progress)

    def check(self, builder: str) -> None:
        """Raise EnvironmentFailure if it is certain that the builder cannot be made."""
        self.runner.check(builder)

    def ready(self, builder: str) -> bool:
        """Return whether the builder already exists."""
        return self.runner.ready(builder)

    def run(
        self, job: Job, progress: Progress, *, stop: int | None = None
    ) -> Mapping[str, JsonValue]:
        """Run the job and return its result; raises the job's own error."""
        return self.runner.run(job, progress, stop=stop)


class WithinMemory(Wrapped):
    """Lowers each job's memory limit to a number of bytes; 0 for no limit.

    A job that needs more then ends with an error of its own, before the machine swaps or the kernel
    kills another program.
    """

    def __init__(self, runner: Runner, limit: int) -> None:
        super().__init__(runner)
        self._limit = limit

    def run(
        self, job: Job, progress: Progress, *, stop: int | None = None
    ) -> Mapping[str, JsonValue]:
        """Run the job within the lower one of its own limit and this one."""
        limit = min(filter(None, (job.memory_bytes, self._limit)), default=0)
        return self.runner.run(replace(job, memory_bytes=limit), progress, stop=stop)
