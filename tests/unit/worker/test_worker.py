"""The worker speaks JSON on standard output, and ends when nobody listens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from weightsmith.core.jobs import Input, Job, write_job

from tests.fakes.echo import EchoJob, package
from tests.paths import ROOT


def echo(tmp_path: Path, seconds: int = 0, **wishes: Any) -> Job:
    (tmp_path / "text").write_text("hello", encoding="utf-8")
    text = Input(path=tmp_path / "text")
    return EchoJob(builder="merge", text=text, output=tmp_path, seconds=seconds, **wishes)


def worker(job: Job | str, tmp_path: Path) -> subprocess.Popen[str]:
    """Start a worker on a job, or on a text in its place."""
    file = tmp_path / "job.json"
    file.write_text(job if isinstance(job, str) else write_job(job), encoding="utf-8")
    return subprocess.Popen(
        [sys.executable, "-m", "weightsmith.worker", str(file)],
        env={**os.environ, "PYTHONPATH": f"{package().parent}:{ROOT}"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(job: Job | str, tmp_path: Path) -> tuple[list[dict], str, int]:
    """Return a worker's messages, what it logs, and its exit code."""
    with worker(job, tmp_path) as process:  # standard input stays open: its end is the worker's
        out, err = process.stdout.read(), process.stderr.read()
    return [json.loads(line) for line in out.splitlines()], err, process.returncode


def test_a_job_says_progress_notes_and_its_result(tmp_path):
    messages, err, code = run(echo(tmp_path), tmp_path)

    assert messages[:2] == [{"note": "echo begins"}, {"progress": [1, 1, "items"]}]
    assert messages[2]["result"]["text"] == "hello"
    assert code == 0
    assert "printed by the stage" in err


def test_an_expected_error_is_one_message_without_traceback(tmp_path):
    messages, err, code = run(echo(tmp_path, fail=3), tmp_path)

    said = {"message": "asked to fail", "hint": "ask for something else", "exit_code": 3}
    assert messages == [{"error": said}]
    assert code == 3
    assert "Traceback" not in err


def test_a_full_disk_is_named_by_the_folder_that_is_written(tmp_path):
    (tmp_path / "echo.txt").symlink_to("/dev/full")
    messages, *_ = run(echo(tmp_path), tmp_path)

    error = messages[-1]["error"]
    assert error["exit_code"] == 5
    assert "the disk is full" in error["message"]
    assert error["message"].endswith(str(tmp_path))
    assert "--out" in error["hint"]


def test_a_surprise_has_its_traceback_on_standard_error(tmp_path):
    messages, err, _ = run(echo(tmp_path, crash="boom"), tmp_path)

    assert messages[0]["error"]["exit_code"] == 1
    assert "Traceback" in err
    assert "boom" in err


@pytest.mark.parametrize("text", ['{"kind": "dance", "job": {}}', '{"kind": "echo"}', "{", "[]"])
def test_what_is_not_a_job_of_this_version_is_refused(text, tmp_path):
    messages, err, code = run(text, tmp_path)

    assert [message["error"]["exit_code"] for message in messages] == [3]
    assert code == 3
    assert "Traceback" not in err


def test_the_worker_ends_when_its_standard_input_does(tmp_path):
    process = worker(echo(tmp_path, sleep=600), tmp_path)
    process.stdout.readline()

    process.stdin.close()

    assert process.wait(timeout=120) == 130
    process.stdout.close()
    process.stderr.close()


@pytest.mark.slow
def test_a_worker_that_hangs_says_where_before_its_time_is_over(tmp_path):
    process = worker(echo(tmp_path, sleep=600, seconds=1), tmp_path)
    with process:
        lines = iter(process.stderr.readline, "")
        assert any("in _echo" in line for line in lines)
        process.stdin.close()


def test_the_worker_needs_nothing_of_the_control_plane():
    code = (
        "import sys, weightsmith.worker.__main__, weightsmith.outside.process;"
        "heavy = ('pydantic', 'rich', 'docker', 'torch', 'filelock');"
        "print([m for m in heavy if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'toolchain'}:{ROOT}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "[]\n"
