"""The tokens of answers that are still being generated, with which a killed job goes on.

They are drafts: the job that continues reads them in one pass and keeps what the model confirms. So
a journal that is damaged, or of another model, costs time and changes no answer.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from weightsmith.core.safe_parse import parse
from weightsmith.forward.greedy import Keep, Tokens, Written

_LARGEST = 1 << 30


class AnswerJournal:
    """A file of JSON lines `[subject, [[question, position, [token, …]], …]]`.

    A subject is its name and a digest of its prompts. Lines that cannot be read are left out: the
    last one may be incomplete.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._found: dict[str, dict[int, list[int]]] = {}
        if path.is_file() and path.stat().st_size <= _LARGEST:
            for line in path.read_bytes().splitlines():
                self._replay(line)

    def partial_answers(self, subject: str, prompts: Sequence[Tokens]) -> Mapping[int, list[int]]:
        """Return the tokens that an interrupted job found, by the question's number."""
        return self._found.get(_name(subject, prompts), {})

    def keep(self, subject: str, prompts: Sequence[Tokens]) -> Keep:
        """Return what writes a subject's new tokens down, for the next process."""
        name = _name(subject, prompts)

        def written(rows: Sequence[Written]) -> None:
            # The line before may be incomplete, if that process was killed.
            line = "\n" + json.dumps([name, rows], separators=(",", ":"))
            with self._lock:
                handle = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
                try:
                    os.write(handle, line.encode())
                finally:
                    os.close(handle)

        return written

    def _replay(self, line: bytes) -> None:
        try:
            subject, rows = parse(line)
            for number, position, tokens in rows:
                if not all(type(n) is int and n >= 0 for n in (number, position, *tokens)):
                    continue
                row = self._found.setdefault(str(subject), {}).setdefault(number, [])
                row[position:] = tokens if position <= len(row) else []
        except (ValueError, TypeError):
            return


def _name(subject: str, prompts: Sequence[Tokens]) -> str:
    asked: Any = [list(prompt) for prompt in prompts]
    return f"{subject} {sha256(json.dumps(asked).encode()).hexdigest()[:16]}"
