"""Runs the first reference job in the process of the validation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from weightsmith.early_answers import EarlyAnswers, early_answers
from weightsmith.errors import WeightsmithError
from weightsmith.jobs import Job, ProofJob, ReferenceJob, ValidateJob
from weightsmith.ports import Progress, Runner
from weightsmith.runners import Wrapped
from weightsmith.values import Json


class Together(Wrapped):
    """A runner whose validation also runs the reference job that follows, and keeps its answers.

    Two jobs import the same libraries, which takes longer than many a validation; and a validation
    reads the merged model's answers as drafts instead of generating text. Each stage asks for its
    own job, gets its own result and stores it under its own key.
    """

    def __init__(
        self,
        runner: Runner,
        next_job: Callable[[], ReferenceJob | None],
        keep: Callable[[Mapping[str, Json]], None],
        clock: Callable[[], float],
    ) -> None:
        """Take what returns the reference job that follows, and a monotonic clock in seconds.

        `keep` stores its answers, if no reference stage will follow: the validation has failed, or
        was killed.
        """
        super().__init__(runner)
        self.next_job = next_job
        self.keep = keep
        self.clock = clock
        self._expected: ReferenceJob | None = None
        self._answers: Mapping[str, Json] = {}
        self._early = 0.0
        """Seconds that the answers took in the validation's time."""

    def run(self, job: Job, progress: Progress, *, stop: int | None = None) -> Mapping[str, Json]:
        """Run the job, or return what ran with the validation; raises the job's own error."""
        if isinstance(job, ValidateJob):
            self._keep_early(job.output)  # of a killed run, maybe to other questions as well
            self._expected = self.next_job()
            if self._expected is None:
                return self.runner.run(job, progress, stop=stop)
            progress.note("the reference questions are asked first, in the same process")
            both: Any = self._run_both(_both(self._expected, job), progress, stop)
            self._answers, self._early = both["answers"], float(both.get("seconds", 0.0))
            if self._answers and not both["validation"]["passed"]:
                with suppress(WeightsmithError):  # what was found matters more
                    self.keep(self._answers)
            return dict(both["validation"])
        if isinstance(job, ReferenceJob) and self._answers and _alike(job, self._expected):
            answers, self._answers, self._early = self._answers, {}, 0.0
            return {"answers": answers}
        return self.runner.run(job, progress, stop=stop)

    def _run_both(self, job: ProofJob, progress: Progress, stop: int | None) -> Mapping[str, Json]:
        """Run both; if the validation does not end, store the answers that came before it."""
        try:
            return self.runner.run(job, progress, stop=stop)
        except BaseException:
            self._keep_early(job.output)
            raise

    def _keep_early(self, folder: Path) -> None:
        """Store the answers that a run left which did not end; without room, they are lost."""
        with suppress(WeightsmithError, OSError):
            if early := early_answers(folder):
                self.keep(early)
                EarlyAnswers(folder).forget()

    def time(self) -> float:
        """Return the clock's time, by which each of the two stages takes what its own part took."""
        return self.clock() - self._early


def _both(reference: ReferenceJob, validation: ValidateJob) -> ProofJob:
    return ProofJob(
        builder=validation.builder,
        reference=replace(reference, output=validation.output),
        validation=validation,
        output=validation.output,
        memory_bytes=max(reference.memory_bytes, validation.memory_bytes),
        seconds=reference.seconds + validation.seconds,
        use_gpu=reference.use_gpu or validation.use_gpu,
    )


def _alike(job: ReferenceJob, other: ReferenceJob | None) -> bool:
    """Return whether both jobs give the same answers."""
    return other is not None and replace(job, output=other.output) == other
