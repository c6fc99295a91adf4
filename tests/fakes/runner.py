"""A runner without a builder: the worker's own stage functions, called in this process."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from toolchain.errors import WeightsmithError, from_code
from toolchain.ports import Progress
from toolchain.values import Job, Json, plain
from toolchain.worker.jobs import STAGES

Stage = Callable[[Job, Callable[[int, int, str], None]], Mapping[str, Json]]


@dataclass
class FakeRunner:
    """Runs stages in-process; what crosses to a worker and back is passed through JSON here too."""

    stages: Mapping[str, Stage] = field(default_factory=lambda: STAGES)
    prepared: list[str] = field(default_factory=list)
    jobs: list[Job] = field(default_factory=list)
    name: str = "fake"

    def prepare(self, builder: str, progress: Progress) -> None:
        if builder not in self.prepared:
            progress.note(f"preparing {builder}")
            self.prepared.append(builder)

    def check(self, builder: str) -> None:
        pass

    def ready(self, builder: str) -> bool:
        return builder in self.prepared

    def run(self, job: Job, progress: Progress) -> Mapping[str, Json]:
        self.prepare(job.builder, progress)
        self.jobs.append(job)
        json.dumps(plain(job.parameters))
        try:
            result = self.stages[job.stage](job, progress.advance)
        except WeightsmithError as error:
            raise from_code(error.exit_code, error.message, error.hint) from None
        except Exception as problem:  # noqa: BLE001 - as the worker does
            raise WeightsmithError(f"unexpected {type(problem).__name__}: {problem}") from None
        return json.loads(json.dumps(plain(result)))


@dataclass
class RecordingProgress:
    """Keeps all that was shown."""

    lines: list[tuple[str, ...]] = field(default_factory=list)

    def stage(self, name: str, detail: str) -> None:
        self.lines.append(("stage", name, detail))

    def advance(self, done: int, total: int, unit: str) -> None:
        self.lines.append(("advance", str(done), str(total), unit))

    def finish(self, name: str, seconds: float, cached: bool) -> None:
        self.lines.append(("finish", name))

    def note(self, text: str) -> None:
        self.lines.append(("note", text))

    def warn(self, text: str) -> None:
        self.lines.append(("warn", text))
