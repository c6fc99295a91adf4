"""A base that found a hole in a library runs its own code in a job, and gets nothing from it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from weightsmith.outside import landlock
from weightsmith.outside.confinement import confinement, targets

from tests.fakes.bare_builder import bare_runner, echo_job
from tests.fakes.echo import package
from tests.fakes.journal import RecordingProgress
from tests.paths import ROOT

WARNING = "jobs have network access, because of --allow-network-in-jobs"


@pytest.fixture
def outside() -> Iterator[dict[str, object]]:
    with targets() as made:
        yield made


def test_a_job_reaches_nothing_but_its_own(tmp_path, outside):
    """It tries the network, sockets, files, modes, processes and signals: nothing goes through."""
    if confinement().reached:
        pytest.skip(f"this kernel leaves jobs {confinement().left()}")

    result = bare_runner(tmp_path).run(echo_job(tmp_path, targets=outside), RecordingProgress())

    assert result["reached"] == dict.fromkeys(result["reached"], False)
    assert Path(str(outside["file"])).read_text() == "the user's"


def test_a_job_writes_to_its_output_and_nowhere_else(tmp_path):
    """It tries its input, our package, its builder, the system and the user's folders."""
    if "files" in confinement().reached:
        pytest.skip("this kernel leaves jobs the user's files")
    runner, job = bare_runner(tmp_path), echo_job(tmp_path)
    builder = next((tmp_path / "builders").glob("merge-*/"))
    folders = [tmp_path, builder, package(), Path.home(), Path("/etc"), Path("/tmp"), job.output]
    paths = [str(folder / "intruder") for folder in folders]

    result = runner.run(echo_job(tmp_path, try_to_write=paths), RecordingProgress())

    assert result["writable"] == [str(job.output / "intruder")]
    assert result["input_writable"] is False


@pytest.mark.slow
@pytest.mark.parametrize("lacking", ["namespaces", "capabilities"])
def test_a_job_has_no_network_where_namespaces_are_refused(lacking, tmp_path):
    """Containers refuse them, and Ubuntu 24.04 makes them useless: the second line holds.

    Nor does it read other files, or the variables of the process that the user started, where
    tokens are; it changes none.
    """
    answer = on_a_machine_without(lacking, tmp_path)

    assert answer["network"] is False
    assert answer["reached"]["network"] is answer["reached"]["sockets"] is False
    if lacking == "namespaces" and landlock.abi():
        assert answer["reached"]["files"] is answer["reached"]["processes"] is False
        assert answer["input_writable"] is False


def test_a_job_that_cannot_be_kept_from_the_network_is_not_run(tmp_path):
    """Neither line holds on this machine: exit 5, with the ways out, and nothing was started."""
    answer = on_a_machine_without("namespaces,seccomp", tmp_path)

    assert answer["exit_code"] == 5
    assert "docker runner" in answer["hint"]
    assert "--allow-network-in-jobs" in answer["hint"]
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.slow
def test_a_job_gets_the_network_where_the_user_said_so_and_it_is_recorded(tmp_path):
    answer = on_a_machine_without("namespaces,seccomp", tmp_path, "--allow-network-in-jobs")

    assert answer["reached"]["network"] is answer["network_in_jobs"] is answer["networked"] is True
    assert ["warn", WARNING] in answer["lines"]


@pytest.mark.slow
def test_that_permission_changes_nothing_where_the_network_can_be_taken_away(tmp_path):
    answer = on_a_machine_without("namespaces", tmp_path, "--allow-network-in-jobs")

    assert answer["network"] is answer["networked"] is False
    assert "network_in_jobs" not in answer


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        "build --recipe examples/tiny/recipe.yaml --dist {}",
        "merge --base examples/tiny/base --adapter examples/tiny/adapters/a --out {}",
        "evaluate --model examples/tiny/base --data examples/tiny/eval-a.jsonl",
    ],
    ids=lambda words: words.partition(" ")[0],
)
def test_no_command_starts_jobs_with_the_network(words, tmp_path):
    """Each is refused before any work: nothing is fetched, made or left behind."""
    argv = [sys.executable, "-m", "invoke", *words.format(tmp_path / "result").split()]

    done = hardened("namespaces,seccomp", [*argv, "--runner", "local"], tmp_path / "cache")

    assert done.returncode == 5, done.stderr
    assert "cannot isolate jobs from the network" in done.stderr
    assert not (tmp_path / "result").exists()
    assert not list((tmp_path / "cache").glob("builders/*"))
    assert "resolve: done" not in done.stderr


def hardened(lacking: str, argv: list[str], cache: Path) -> subprocess.CompletedProcess[str]:
    """Run a program where the kernel withholds some of its means."""
    paths = {"PYTHONPATH": f"{ROOT / 'toolchain'}:{ROOT}", "WEIGHTSMITH_HOME": str(cache)}
    return subprocess.run(
        [sys.executable, ROOT / "tests" / "fakes" / "hardened.py", lacking, *argv],
        cwd=ROOT, env={**os.environ, **paths}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def on_a_machine_without(lacking: str, folder: Path, *flags: str) -> dict[str, Any]:
    """Run a job that tries everything; return its answer, or the error that it was refused by."""
    argv = [sys.executable, "-m", "tests.fakes.bare_builder", str(folder), *flags]
    done = hardened(lacking, argv, folder / "cache")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
