"""What a killed reference job leaves, and how the next one goes on."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from weightsmith.merging import reference
from weightsmith.merging.reference import AnswerJournal, GenerationRequest, UnmergedModel, answered

from tests.paths import ROOT

TINY = ROOT / "examples" / "tiny"
QUESTIONS = [
    [{"role": "user", "content": f"What is the capital of {name}?"}]
    for name in ("Avolia", "Brenland", "Costaria")
]
MOST = 24


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base with another end token, so that no answer ends early."""
    folder = Path(shutil.copytree(TINY / "base", tmp_path_factory.mktemp("models") / "base"))
    for name in ("config.json", "generation_config.json"):
        value = json.loads((folder / name).read_text("utf-8")) | {"eos_token_id": 3}
        (folder / name).write_text(json.dumps(value), "utf-8")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {"eos_token": "<pad>"}))
    return folder


def subjects(base: Path) -> dict[str, UnmergedModel]:
    adapter = ((TINY / "adapters" / "a", 1.0),)
    return {
        "base": UnmergedModel(model=base),
        "adapter": UnmergedModel(model=base, adapters=adapter),
    }


def asked(subjects: dict[str, UnmergedModel]) -> dict[str, GenerationRequest]:
    return {
        name: GenerationRequest(subject=one, items=QUESTIONS, max_tokens=MOST)
        for name, one in subjects.items()
    }


def texts(found: Any) -> dict[str, list[tuple[Any, ...]]]:
    names = ("answer", "finish_reason", "prompt_tokens", "token_ends")
    return {
        subject: [tuple(map(str, (row[n] for n in names))) for row in one.rows]
        for subject, one in found.items()
    }


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from tests.unit.merging import test_answer_journal as here
from weightsmith.merging.reference import AnswerJournal

own, lines = AnswerJournal.keep, []
def keep(self, subject, prompts):
    written = own(self, subject, prompts)
    def count(rows):
        written(rows)
        lines.append(rows)
        if len(lines) == 20:
            os.kill(os.getpid(), signal.SIGKILL)
    return count
AnswerJournal.keep = keep
base, journal = map(Path, sys.argv[1:3])
here.answered(here.asked(here.subjects(base)), journal=AnswerJournal(journal))
"""


@pytest.mark.slow
def test_a_killed_job_goes_on_where_it_was(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL in the middle of the answers: the next job reads what there is in one pass."""
    journal, whole = tmp_path / "journal", tmp_path / "whole"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(base), str(journal), str(ROOT)],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    before = sum(map(bool, journal.read_bytes().splitlines()))
    decoded: list[int] = []
    own = reference.greedy

    def counted(model: Any, asked: Any, advance: Any) -> Any:
        keep = asked.keep
        asked.keep = lambda rows: (decoded.append(len(rows)), keep(rows))[1]
        return own(model, asked, advance)

    monkeypatch.setattr(reference, "greedy", counted)

    found = answered(asked(subjects(base)), journal=AnswerJournal(journal))
    resumed = len(decoded)
    decoded.clear()
    uninterrupted = answered(asked(subjects(base)), journal=AnswerJournal(whole))

    assert before == 20
    assert texts(found) == texts(uninterrupted)
    assert all(row["finish_reason"] == "length" for one in found.values() for row in one.rows)
    assert resumed < len(decoded) - 6


def test_a_journal_is_read_as_far_as_it_is_whole(tmp_path: Path) -> None:
    path, prompts = tmp_path / "journal", [[5, 6], [7]]
    keep = AnswerJournal(path).keep("base", prompts)
    keep([(0, 0, [11]), (1, 0, [21])])
    keep([(0, 1, [12]), (1, 1, [22])])
    keep([(0, 0, [11, 12, 13])])
    keep([(1, 7, [29])])  # a gap: what came before it is lost
    keep([(1, -1, [1]), (1, 2, [-4])])
    with path.open("ab") as file:
        file.write(b'["base", [[0, 3, [14')

    partial_answers = AnswerJournal(path).partial_answers("base", prompts)

    assert partial_answers == {0: [11, 12, 13], 1: [21, 22]}

    AnswerJournal(path).keep("base", prompts)([(0, 3, [14])])

    assert AnswerJournal(path).partial_answers("base", prompts)[0] == [11, 12, 13, 14]


def test_a_journal_of_other_questions_or_another_subject_is_not_used(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    AnswerJournal(path).keep("base", [[5, 6]])([(0, 0, [11])])

    assert AnswerJournal(path).partial_answers("base", [[5, 7]]) == {}
    assert AnswerJournal(path).partial_answers("adapter", [[5, 6]]) == {}


@pytest.mark.slow
def test_a_wrong_journal_changes_no_answer(base: Path, tmp_path: Path) -> None:
    """It is a draft that the model does not confirm."""
    path, only = tmp_path / "journal", asked({"base": subjects(base)["base"]})
    right = answered(only, journal=AnswerJournal(path))
    path.write_bytes(path.read_bytes().replace(b"[1", b"[2").replace(b",3", b",4"))

    assert texts(answered(only, journal=AnswerJournal(path))) == texts(right)
