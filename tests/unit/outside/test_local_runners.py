"""Runners on this machine: what they refuse, and when the `auto` runner changes over."""

from pathlib import Path

import pytest
from weightsmith.core.errors import EnvironmentFailure, InputRefused, UsageError
from weightsmith.core.jobs import ExportEngineJob
from weightsmith.core.ports import Silent
from weightsmith.outside import local
from weightsmith.outside.confinement import Confinement
from weightsmith.outside.local import FallbackRunner

from tests.fakes.bare_builder import bare_builder, echo_job
from tests.fakes.journal import RecordingProgress


class Runner:
    networked = False

    def __init__(self, name: str, *, prepares: bool = True, fails: bool = False) -> None:
        self.name, self._prepares, self._fails = name, prepares, fails
        self.jobs: list[str] = []

    def prepare(self, builder, progress):
        if not self._prepares:
            raise EnvironmentFailure(
                "building failed:\n#1 starting\nthe base image cannot be pulled\n"
            )

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


@pytest.fixture
def nothing_holds(monkeypatch):
    monkeypatch.setattr(local, "confinement", Confinement)


def test_without_any_confinement_the_local_runner_refuses(nothing_holds, tmp_path):
    runner, progress = local.LocalRunner(bare_builder(tmp_path)), RecordingProgress()
    either = FallbackRunner(Runner("docker", prepares=False), runner)

    for refused in (
        lambda: runner.check("merge"),
        lambda: runner.prepare("merge", progress),
        lambda: runner.run(echo_job(tmp_path), progress),
        lambda: either.run(echo_job(tmp_path), progress),
    ):
        with pytest.raises(EnvironmentFailure, match="isolate jobs from the network") as caught:
            refused()
        assert "--allow-network-in-jobs" in caught.value.hint
    assert not Confinement().network
    assert "the network" in Confinement().left()
    assert Confinement().blocked() == ""


def test_a_builder_cannot_be_in_a_folder_with_a_colon(tmp_path):
    """PATH and PYTHONPATH would be two folders, and `venv` refuses it too."""
    runner, progress = local.LocalRunner(tmp_path / "a:b", allow_network=True), RecordingProgress()

    for refused in (lambda: runner.check("merge"), lambda: runner.prepare("merge", progress)):
        with pytest.raises(UsageError, match="has a colon") as caught:
            refused()
        assert "WEIGHTSMITH_HOME" in caught.value.hint


def test_whoever_allows_the_network_is_warned_once(nothing_holds, tmp_path):
    runner = local.LocalRunner(bare_builder(tmp_path), allow_network=True)
    either = FallbackRunner(Runner("docker", prepares=False), runner)
    progress = RecordingProgress()
    assert not either.networked

    results = [either.run(echo_job(tmp_path / name), progress) for name in ("a", "b")]

    assert [result["network_in_jobs"] for result in results] == [True, True]
    assert either.networked
    warned = [line for line in progress.lines if "--allow-network-in-jobs" in line[-1]]
    assert len(warned) == 1
