"""A runner whose jobs get no more memory than the user allows or the machine has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from weightsmith.jobs import Job
from weightsmith.ports import Progress, Runner
from weightsmith.values import Json


class WithinMemory:
    """Lowers each job's memory limit to a number of bytes.

    A job that needs more then ends with an error of its own, before the machine swaps or the kernel
    kills another program.
    """

    def __init__(self, runner: Runner, limit: int) -> None:
        self._runner = runner
        self._limit = limit
        self.name = runner.name

    @property
    def networked(self) -> bool:
        """Say whether any job had network access."""
        return self._runner.networked

    def prepare(self, builder: str, progress: Progress) -> None:
        """Prepare the builder."""
        self._runner.prepare(builder, progress)

    def check(self, builder: str) -> None:
        """Raise EnvironmentFailure if the builder cannot be made."""
        self._runner.check(builder)

    def ready(self, builder: str) -> bool:
        """Say whether the builder is ready."""
        return self._runner.ready(builder)

    def run(self, job: Job, progress: Progress, *, stop: int | None = None) -> Mapping[str, Json]:
        """Run the job within the lower one of its own limit and this one."""
        limit = min(filter(None, (job.memory_bytes, self._limit)), default=0)
        return self._runner.run(replace(job, memory_bytes=limit), progress, stop=stop)
