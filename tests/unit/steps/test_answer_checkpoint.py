"""Answers that a job leaves one by one: each whole, or not there."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from weightsmith.steps.answer_checkpoint import FILE, AnswerCheckpoint, checkpointed_answers


def test_a_line_that_was_cut_off_is_not_there(tmp_path: Path) -> None:
    for key in ("a", "b"):
        AnswerCheckpoint(tmp_path).keep(key, [{"answer": f"{key} \n \u2028 \U0001f642"}])
    file = tmp_path / FILE
    file.write_bytes(file.read_bytes()[:-3])
    AnswerCheckpoint(tmp_path).keep("c", [1.5])

    found = checkpointed_answers(tmp_path)

    assert found == {"a": [{"answer": "a \n \u2028 \U0001f642"}], "c": [1.5]}
    AnswerCheckpoint(tmp_path).forget()
    assert checkpointed_answers(tmp_path) == {}


@pytest.mark.parametrize("line", ["3", "[]", "null", '{"a": 1, "b": 2}', '["a", "b"]', "[1, []]"])
def test_what_is_no_answer_is_left_out(tmp_path: Path, line: str) -> None:
    (tmp_path / FILE).write_text(line + "\n" + json.dumps(["key", []]), "utf-8")

    assert checkpointed_answers(tmp_path) == {"key": []}


def test_only_a_regular_file_is_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / FILE)

    assert checkpointed_answers(tmp_path) == {}
