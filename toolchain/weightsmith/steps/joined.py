"""The reference job that runs in the process of the validation, before it.

Two jobs import the same libraries, which takes longer than many a validation; and a validation
reads the merged model's answers as drafts instead of generating text. Each step stores its own
result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from weightsmith.core.errors import WeightsmithError
from weightsmith.core.jobs import ProofJob, ReferenceJob, ValidateJob
from weightsmith.core.values import JsonValue
from weightsmith.steps.answer_checkpoint import AnswerCheckpoint, Answered, checkpointed_answers
from weightsmith.steps.tools import Tools


class JoinedJob:
    """What the validation is to run first, and what became of it."""

    def __init__(
        self,
        next_job: Callable[[], ReferenceJob | None],
        keep: Callable[[Answered], None],
    ) -> None:
        """Take what returns the job, None if nothing is left to ask, and what stores answers."""
        self._next_job = next_job
        self._keep = keep
        self.seconds = 0.0
        """Seconds that the answers took."""
        self.ran = False

    def run_with(self, validation: ValidateJob, tools: Tools) -> Mapping[str, JsonValue]:
        """Run both, store the answers, and return what the validation found."""
        self._keep_checkpoint(validation.output)  # of a killed run, maybe to other questions too
        reference = self._next_job()
        if reference is None:
            return tools.runner.run(validation, tools.progress)
        tools.progress.note("the reference questions are asked first, in the same process")
        job = ProofJob(
            builder=validation.builder,
            reference=replace(reference, output=validation.output),
            validation=validation,
            output=validation.output,
            memory_bytes=max(reference.memory_bytes, validation.memory_bytes),
            seconds=reference.seconds + validation.seconds,
            use_gpu=reference.use_gpu or validation.use_gpu,
        )
        try:
            both: Any = tools.runner.run(job, tools.progress)
        except BaseException:
            self._keep_checkpoint(validation.output)
            raise
        self.seconds, self.ran = float(both.get("seconds", 0.0)), True
        if answers := both["answers"]:
            with suppress(WeightsmithError):  # without room they are asked again
                self._keep(answers)
        return dict(both["validation"])

    def _keep_checkpoint(self, folder: Path) -> None:
        """Store the answers that a run left which did not end; without room, they are lost."""
        with suppress(WeightsmithError, OSError):
            if answers := checkpointed_answers(folder):
                self._keep(answers)
                AnswerCheckpoint(folder).forget()
