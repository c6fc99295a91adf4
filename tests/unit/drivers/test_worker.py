"""The worker speaks JSON on standard output, and the control plane understands it."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from weightsmith.drivers.lines import RESULT, Lines
from weightsmith.drivers.process import TookTooLong
from weightsmith.drivers.wire import Conversation, job_file
from weightsmith.errors import EnvironmentFailure, InputRefused, WeightsmithError
from weightsmith.values import Job

from tests.fakes.journal import RecordingProgress

ROOT = Path(__file__).parents[3]


class Log(io.StringIO):
    name = "/logs/job.log"


def echo(tmp_path: Path, stage: str = "echo", seconds: int = 0, **parameters: object) -> Job:
    (tmp_path / "text").write_text("hello", encoding="utf-8")
    return Job(
        stage=stage,
        builder="merge",
        inputs={"text": tmp_path / "text"},
        parameters=parameters,
        output=tmp_path,
        seconds=seconds,
    )


def worker(job: Job, tmp_path: Path, **options: object) -> subprocess.Popen[str]:
    file = tmp_path / "job.json"
    inputs = {name: str(path) for name, path in job.inputs.items()}
    file.write_text(job_file(job, inputs, str(job.output)), encoding="utf-8")
    return subprocess.Popen(
        [sys.executable, "-m", "weightsmith.worker", str(file)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen[str]) -> tuple[list[dict], str]:
    """Wait without closing standard input, which would end the worker."""
    with process:
        out, err = process.stdout.read(), process.stderr.read()
    return [json.loads(line) for line in out.splitlines()], err


def test_a_job_says_progress_notes_and_its_result(tmp_path):
    process = worker(echo(tmp_path), tmp_path)

    messages, err = ended(process)

    assert messages[0] == {"note": "echo begins"}
    assert messages[1] == {"progress": [1, 1, "items"]}
    assert messages[2]["result"]["text"] == "hello"
    assert process.returncode == 0
    assert "printed by the stage" in err


def test_an_expected_error_is_one_message_without_traceback(tmp_path):
    process = worker(echo(tmp_path, fail=3), tmp_path)

    messages, err = ended(process)

    said = {"message": "asked to fail", "hint": "ask for something else", "exit_code": 3}
    assert messages == [{"error": said}]
    assert process.returncode == 3
    assert "Traceback" not in err


def test_a_surprise_has_its_traceback_on_standard_error(tmp_path):
    process = worker(echo(tmp_path, crash="boom"), tmp_path)

    messages, err = ended(process)

    assert messages[0]["error"]["exit_code"] == 1
    assert "Traceback" in err
    assert "boom" in err


def test_an_unknown_stage_is_refused(tmp_path):
    messages, _ = ended(worker(echo(tmp_path, stage="dance"), tmp_path))

    assert "dance" in messages[0]["error"]["message"]


def test_the_worker_ends_when_its_standard_input_does(tmp_path):
    process = worker(echo(tmp_path, sleep=600), tmp_path)
    process.stdout.readline()

    process.stdin.close()

    assert process.wait(timeout=120) == 130
    process.stdout.close()
    process.stderr.close()


def test_a_worker_that_hangs_says_where_before_its_time_is_over(tmp_path):
    process = worker(echo(tmp_path, sleep=600, seconds=1), tmp_path)
    with process:
        lines = iter(process.stderr.readline, "")
        assert any("in _echo" in line for line in lines)
        process.stdin.close()


def test_the_worker_needs_nothing_of_the_control_plane():
    code = (
        "import sys, weightsmith.worker.__main__, weightsmith.drivers.process;"
        "heavy = ('pydantic', 'rich', 'docker', 'torch', 'filelock');"
        "print([m for m in heavy if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "[]\n"


@pytest.fixture
def conversation(tmp_path):
    return Conversation(job=echo(tmp_path), progress=RecordingProgress(), log=Log())


@pytest.mark.parametrize("megabytes", [3, 20])
def test_a_result_of_megabytes_arrives(conversation, megabytes):
    answers = ["x" * 1000] * (megabytes * 1000)
    line = json.dumps({"result": {"answers": answers}}).encode() + b"\n"
    lines = Lines(RESULT)

    for at in range(0, len(line), 1 << 16):
        for heard in lines.feed(line[at : at + (1 << 16)]):
            conversation.hear(heard)

    assert conversation.result(0) == {"answers": answers}


def test_messages_become_progress(conversation):
    conversation.hear('{"progress": [1, 2, "bytes"]}')
    conversation.hear('{"note": "n"}')
    conversation.hear('{"warn": "w"}')

    assert conversation.progress.lines == [
        ("advance", "1", "2", "bytes"),
        ("note", "n"),
        ("warn", "w"),
    ]


def test_a_line_that_is_no_message_goes_to_the_log(conversation):
    for line in ("no json", "[1]", '{"other": 1}', '{"progress": "soon"}'):
        conversation.hear(line)

    assert conversation.log.getvalue().splitlines() == [
        "no json",
        "[1]",
        '{"other": 1}',
        '{"progress": "soon"}',
    ]
    with pytest.raises(WeightsmithError, match="without a result"):
        conversation.result(0)


def test_a_result_counts_only_with_exit_code_zero(conversation):
    conversation.hear('{"result": {"a": 1}}')

    assert conversation.result(0) == {"a": 1}
    with pytest.raises(WeightsmithError, match="exit code 2"):
        conversation.result(2)


def test_an_error_is_rebuilt_from_its_code(conversation):
    conversation.hear('{"error": {"message": "bad", "hint": "fix", "exit_code": 3}}')

    with pytest.raises(InputRefused, match="bad") as caught:
        conversation.result(3)
    assert caught.value.hint == "fix"


def test_an_unexpected_error_names_the_log(conversation):
    conversation.hear('{"error": {"message": "bad", "hint": "see the log", "exit_code": 1}}')

    with pytest.raises(WeightsmithError) as caught:
        conversation.result(1)
    assert caught.value.hint == "see the log: /logs/job.log"


@pytest.mark.parametrize("code", [-9, 137])
def test_a_killed_worker_most_likely_lacked_memory(conversation, code):
    with pytest.raises(EnvironmentFailure, match="memory ran out"):
        conversation.result(code)


def test_silence_is_an_error_with_the_last_line(conversation):
    conversation.hear_error("the last words")

    with pytest.raises(WeightsmithError, match="the last words"):
        conversation.result(0)


def test_a_job_that_was_ended_says_what_it_was_at(tmp_path):
    job = echo(tmp_path, seconds=5400)
    conversation = Conversation(job=job, progress=RecordingProgress(), log=Log())
    conversation.hear('{"note": "reading"}')
    conversation.hear('{"progress": [3, 12, "layers"]}')
    conversation.hear('{"doing": "rendering the chat template of /m"}')

    with (
        pytest.raises(EnvironmentFailure, match="after 1 h 30 min") as caught,
        conversation.in_time(),
    ):
        raise TookTooLong("python did not end within 5400 s", hint="")

    assert "rendering the chat template of /m, 3 of 12 layers done" in caught.value.message
    assert "/logs/job.log" in caught.value.hint
    assert "WEIGHTSMITH_JOB_SECONDS" in caught.value.hint


def test_what_has_ended_is_not_named(conversation):
    conversation.hear('{"note": "converting"}')
    conversation.hear('{"doing": "cutting text into tokens"}')
    conversation.hear('{"doing": ""}')

    with pytest.raises(EnvironmentFailure, match="it was at: converting"):
        conversation.result(-9)


def test_messages_of_a_container_name_the_files_of_this_machine(tmp_path):
    progress = RecordingProgress()
    conversation = Conversation(job=echo(tmp_path), progress=progress, log=Log(), inside="/in")
    conversation.hear('{"note": "/in/text, /in/text/x and /in/other; not /a/in/text"}')
    conversation.hear('{"error": {"message": "/in/text is bad", "hint": "", "exit_code": 3}}')

    here = tmp_path / "text"
    said = f"{here}, {here}/x and /in/other; not /a/in/text"
    assert progress.lines == [("note", said)]
    with pytest.raises(InputRefused, match=f"^{here} is bad"):
        conversation.result(3)
