"""Answers of a server in a file of the user's, for the run that goes on with the others."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from weightsmith.core.errors import UsageError
from weightsmith.core.safe_parse import RECORD, content, parse
from weightsmith.core.values import JsonValue, key_of
from weightsmith.evaluating.client import Ask
from weightsmith.evaluating.items import Item

_BEGIN = b'\n["sha256:'


class KeptAnswers:
    """A file of JSON lines `[key, answer]`, which several threads may add to.

    A key is that of the question and of all of the request that the server is told. Whether it is
    the same model is for the user to know: a URL does not say. A line that was cut off counts as
    none. Raises UsageError for a file that cannot be read or has other lines.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._found: dict[str, Mapping[str, JsonValue]] = {}
        try:
            data = content(path, RECORD) if path.exists() else b""
            os.close(self._open())  # now, and not after the first answer
        except (OSError, ValueError) as error:
            raise _refused(path, str(error)) from None
        if data and not data.startswith(_BEGIN):
            raise _refused(path, "it has other lines")
        for line in data.splitlines():
            self._read(line)

    def around(self, ask: Ask, about: JsonValue) -> Ask:
        """Return what asks only questions without an answer, and writes each answer down."""

        def asked(item: Item) -> Mapping[str, JsonValue]:
            key = key_of([about, [dict(m) for m in item.messages], item.choices, item.plain])
            if key in self._found:
                return self._found[key]
            began = time.monotonic()
            said = {**ask(item), "seconds": round(time.monotonic() - began, 4)}
            self._write(key, said)
            return said

        return asked

    def _open(self) -> int:
        return os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)

    def _read(self, line: bytes) -> None:
        with suppress(ValueError, TypeError, KeyError):
            key, answer = parse(line)
            if isinstance(key, str) and isinstance(answer["answer"], str):
                self._found[key] = answer

    def _write(self, key: str, answer: Mapping[str, JsonValue]) -> None:
        # The line before may be incomplete, if that process was killed.
        line = "\n" + json.dumps([key, answer])
        with self._lock:
            handle = self._open()
            try:
                os.write(handle, line.encode())
            finally:
                os.close(handle)


def _refused(path: Path, why: str) -> UsageError:
    return UsageError(
        f"--answers {path}: {why}", hint="give a new file, or one that `evaluate --answers` wrote"
    )
