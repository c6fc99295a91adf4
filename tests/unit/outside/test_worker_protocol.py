"""What a job says becomes progress, results and errors; and its log is kept."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pytest
from weightsmith.core.errors import EnvironmentFailure, InputRefused, WeightsmithError
from weightsmith.core.jobs import Input, Job
from weightsmith.outside.lines import RESULT, Lines
from weightsmith.outside.process import TookTooLong
from weightsmith.outside.worker_protocol import Conversation, open_log

from tests.fakes.echo import EchoJob
from tests.fakes.journal import RecordingProgress


class Log(io.StringIO):
    name = "/logs/job.log"


def job_in(tmp_path: Path, seconds: int = 0) -> Job:
    text = Input(path=tmp_path / "text")
    return EchoJob(builder="merge", text=text, output=tmp_path, seconds=seconds)


@pytest.fixture
def conversation(tmp_path):
    return Conversation(job=job_in(tmp_path), progress=RecordingProgress(), log=Log())


def test_a_result_of_megabytes_arrives(conversation):
    answers = ["x" * 1000] * 20_000
    line = json.dumps({"result": {"answers": answers}}).encode() + b"\n"
    lines = Lines(RESULT)

    for at in range(0, len(line), 1 << 16):
        for heard in lines.feed(line[at : at + (1 << 16)]):
            conversation.on_line(heard)

    assert conversation.result(0) == {"answers": answers}


def test_messages_become_progress_and_other_lines_go_to_the_log(conversation):
    others = ["no json", "[1]", '{"other": 1}', '{"progress": "soon"}']
    for line in ('{"progress": [1, 2, "bytes"]}', '{"note": "n"}', '{"warn": "w"}', *others):
        conversation.on_line(line)

    told = [("advance", "1", "2", "bytes"), ("note", "n"), ("warn", "w")]
    assert conversation.progress.lines == told
    assert conversation.log.getvalue().splitlines() == others
    with pytest.raises(WeightsmithError, match="without a result"):
        conversation.result(0)
    conversation.on_error_line("the last words")
    with pytest.raises(WeightsmithError, match="the last words"):
        conversation.result(0)
    conversation.on_line('{"result": {"a": 1}}')
    assert conversation.result(0) == {"a": 1}
    with pytest.raises(WeightsmithError, match="exit code 2"):
        conversation.result(2)


@pytest.mark.parametrize(
    ("code", "kind", "hint"),
    [(3, InputRefused, "see the log"), (1, WeightsmithError, "see the log: /logs/job.log")],
)
def test_an_error_is_rebuilt_from_its_code_and_an_unexpected_one_names_the_log(
    conversation, code, kind, hint
):
    error = {"message": "bad", "hint": "see the log", "exit_code": code}
    conversation.on_line(json.dumps({"error": error}))

    with pytest.raises(kind, match="bad") as caught:
        conversation.result(code)
    assert caught.value.hint == hint


@pytest.mark.parametrize("code", [-9, 137])
def test_a_killed_worker_most_likely_lacked_memory(conversation, code):
    with pytest.raises(EnvironmentFailure, match="memory ran out"):
        conversation.result(code)


def test_a_job_that_was_ended_says_what_it_was_at(tmp_path):
    job = job_in(tmp_path, seconds=5400)
    conversation = Conversation(job=job, progress=RecordingProgress(), log=Log())
    conversation.on_line('{"note": "reading"}')
    conversation.on_line('{"progress": [3, 12, "layers"]}')
    conversation.on_line('{"doing": "rendering the chat template of /m"}')

    with (
        pytest.raises(EnvironmentFailure, match="after 1 h 30 min") as caught,
        conversation.in_time(),
    ):
        raise TookTooLong("python did not end within 5400 s", hint="")

    assert "rendering the chat template of /m, 3 of 12 layers done" in caught.value.message
    assert "/logs/job.log" in caught.value.hint
    assert "WEIGHTSMITH_JOB_SECONDS" in caught.value.hint


def test_what_has_ended_is_not_named(conversation):
    conversation.on_line('{"note": "converting"}')
    conversation.on_line('{"doing": "cutting text into tokens"}')
    conversation.on_line('{"doing": ""}')

    with pytest.raises(EnvironmentFailure, match="it was at: converting"):
        conversation.result(-9)


def test_messages_of_a_container_name_the_files_of_this_machine(tmp_path):
    progress = RecordingProgress()
    conversation = Conversation(job=job_in(tmp_path), progress=progress, log=Log(), inside="/in")
    conversation.on_line('{"note": "/in/text, /in/text/x and /in/other; not /a/in/text"}')
    conversation.on_line('{"error": {"message": "/in/text is bad", "hint": "", "exit_code": 3}}')

    here = tmp_path / "text"
    said = f"{here}, {here}/x and /in/other; not /a/in/text"
    assert progress.lines == [("note", said)]
    with pytest.raises(InputRefused, match=f"^{here} is bad"):
        conversation.result(3)


def test_the_log_of_a_long_job_outlives_those_of_many_short_ones(tmp_path: Path) -> None:
    folder = tmp_path / "logs"
    folder.mkdir()
    for number in range(50):
        path = folder / f"20260101T{number:06d}-1-000-merge.log"
        path.write_text("x")
        os.utime(path, (1000 + number, 1000 + number))
    long = folder / "20250101T000000-1-000-quantize.log"
    long.write_text("first by name, and written to last")

    with open_log(tmp_path, "bake"):
        kept = {path.name for path in folder.iterdir()}

    assert long.name in kept
    assert "20260101T000000-1-000-merge.log" not in kept
