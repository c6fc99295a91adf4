"""Answers that a job has finished, for whoever goes on if it does not end.

They lie in a file of the job's output, one line `[key, answers]` for each model. A key is the
digest of all that the answers depend on, so a file that another run left may be used: a line is
whole, or it is not there.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from weightsmith.core.safe_parse import RECORD, content, parse
from weightsmith.core.values import JsonValue

FILE = ".answered.jsonl"
Rows = Sequence[Mapping[str, JsonValue]]
"""A model's answers, as a job gives them."""
Answered = Mapping[str, Rows]
"""Those of models, by their keys."""


class AnswerCheckpoint:
    """The file in a job's output, which several threads may write to."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        self._lock = threading.Lock()

    def keep(self, key: str, answers: JsonValue) -> None:
        """Write a model's answers down before returning."""
        # The line before may be incomplete, if that process was killed.
        line = "\n" + json.dumps([key, answers])
        with self._lock, self._path.open("a", encoding="utf-8") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    def forget(self) -> None:
        """Delete the file."""
        self._path.unlink(missing_ok=True)


def checkpointed_answers(folder: Path) -> Answered:
    """Return the answers in a job's output by key; none if the file cannot be read."""
    try:
        lines = content(folder / FILE, RECORD).split(b"\n")
    except (OSError, ValueError):
        return {}
    found: dict[str, Rows] = {}
    for line in lines:
        try:
            key, answers = parse(line, largest=RECORD)
        except (ValueError, TypeError):
            continue
        if isinstance(key, str) and isinstance(answers, list):
            found[key] = answers
    return found
