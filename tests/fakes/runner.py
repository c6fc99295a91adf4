"""A runner without a builder: stage functions, the worker's own or a test's, in this process."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from weightsmith.core.errors import EnvironmentFailure, WeightsmithError, from_code
from weightsmith.core.jobs import Job, read_job, write_job
from weightsmith.core.ports import Progress
from weightsmith.core.values import Json, plain
from weightsmith.worker.jobs import STAGES
from weightsmith.worker.virtual import computed

from tests.fakes.journal import Journal

Stage = Callable[[Any, Callable[[int, int, str], None]], Mapping[str, Json]]


@dataclass
class MemoryRunner:
    """Runs jobs in-process; what crosses to a worker and back is passed through JSON here too."""

    stages: Mapping[str, Stage] = field(default_factory=lambda: STAGES)
    prepared: list[str] = field(default_factory=list)
    jobs: list[Job] = field(default_factory=list)
    lacking: set[str] = field(default_factory=set)
    """Builders that cannot be made here."""
    journal: Journal = field(default_factory=Journal)
    name: str = "memory"
    networked: bool = False

    def prepare(self, builder: str, progress: Progress) -> None:
        self.check(builder)
        if builder not in self.prepared:
            progress.note(f"preparing {builder}")
            self.prepared.append(builder)

    def check(self, builder: str) -> None:
        if builder in self.lacking:
            raise EnvironmentFailure(f"no builder {builder} can be made", hint="install it")

    def ready(self, builder: str) -> bool:
        return builder in self.prepared

    def run(self, job: Job, progress: Progress, *, stop: int | None = None) -> Mapping[str, Json]:
        self.prepare(job.builder, progress)
        self.jobs.append(job)
        try:
            self.journal.add(f"job {job.kind}")
            with computed(job):
                result = self.stages[job.kind](read_job(write_job(job)), progress.advance)
        except WeightsmithError as error:
            raise from_code(error.exit_code, error.message, error.hint) from None
        except Exception as problem:  # noqa: BLE001 - as the worker does
            raise WeightsmithError(f"unexpected {type(problem).__name__}: {problem}") from None
        crossed: Mapping[str, Json] = json.loads(json.dumps(plain(result)))
        return crossed
