"""The `auto` runner changes over once, with a warning, and never hides a job's own failure."""

from pathlib import Path

import pytest
from weightsmith.core.errors import EnvironmentFailure, InputRefused
from weightsmith.core.jobs import ExportEngineJob
from weightsmith.core.ports import Silent
from weightsmith.outside.local import FallbackRunner

from tests.fakes.journal import RecordingProgress


class Runner:
    def __init__(self, name: str, *, prepares: bool = True, fails: bool = False) -> None:
        self.name, self._prepares, self._fails = name, prepares, fails
        self.jobs: list[str] = []

    def prepare(self, builder, progress):
        if not self._prepares:
            raise EnvironmentFailure(
                "building failed:\n#1 starting\nthe base image cannot be pulled\n"
            )

    def ready(self, builder):
        return self._prepares

    def run(self, job, progress, *, stop=None):
        self.jobs.append(job.kind)
        if self._fails:
            raise InputRefused("no")
        return {"by": self.name}


JOB = ExportEngineJob(builder="merge", output=Path(), seconds=0)


def test_the_first_runner_is_preferred() -> None:
    assert FallbackRunner(Runner("docker"), Runner("local")).run(JOB, Silent()) == {"by": "docker"}


def test_the_second_takes_over_with_one_warning() -> None:
    progress = RecordingProgress()
    runner = FallbackRunner(Runner("docker", prepares=False), Runner("local"))

    assert [runner.run(JOB, progress) for _ in range(2)] == [{"by": "local"}] * 2
    assert len(progress.warnings) == 1
    assert progress.warnings[0].endswith("building failed: the base image cannot be pulled")


def test_a_jobs_own_failure_is_not_tried_again() -> None:
    second = Runner("local")
    with pytest.raises(InputRefused):
        FallbackRunner(Runner("docker", fails=True), second).run(JOB, Silent())
    assert not second.jobs
