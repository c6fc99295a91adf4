"""Reads a worker's JSON lines and turns them into progress, a result or an error."""

from __future__ import annotations

import os
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from weightsmith.core.errors import (
    EnvironmentFailure,
    WeightsmithError,
    from_code,
    too_many_processes,
)
from weightsmith.core.files import age_order
from weightsmith.core.jobs import Job, out_of_memory
from weightsmith.core.ports import Progress
from weightsmith.core.privacy import private
from weightsmith.core.safe_parse import parse
from weightsmith.core.time_limits import VARIABLE
from weightsmith.core.values import JsonValue
from weightsmith.outside.lines import LONGEST, RESULT
from weightsmith.outside.process import TookTooLong, describe_exit

_LOGS_KEPT = 40
_KILLED = (-9, 137)


@dataclass(slots=True)
class Conversation:
    """Reads one worker's output until it has sent its result."""

    job: Job
    progress: Progress
    log: TextIO
    inside: str = ""
    """Folder of the inputs inside the container, if any; messages get our own paths."""
    _result: Mapping[str, JsonValue] | None = None
    _error: WeightsmithError | None = None
    _stderr: list[str] = field(default_factory=list)
    _noted: str = ""
    _doing: str = ""
    _done: str = ""

    def on_line(self, line: str) -> None:
        """Process one line of the worker's standard output."""
        try:
            message = parse(line, largest=RESULT)
        except ValueError:
            message = None
        if not isinstance(message, dict):
            self.on_error_line(line)
            return
        match message:
            case {"progress": [int(done), int(total), str(unit)]}:
                self._done = f"{done} of {total} {unit} done"
                self.progress.advance(done, total, unit)
            case {"doing": str(text)}:
                self._doing = self._with_host_paths(text)
            case {"note": str(text)}:
                self._noted = self._with_host_paths(text)
                self.progress.note(self._noted)
            case {"warn": str(text)}:
                self.progress.warn(self._with_host_paths(text))
            case {"result": dict(result)}:
                self._result = result
            case {"error": {"message": str(message), "hint": str(hint), "exit_code": int(code)}}:
                self._error = from_code(
                    code, self._with_host_paths(message), self._with_host_paths(hint)
                )
            case _:
                self.on_error_line(line)

    def on_error_line(self, line: str) -> None:
        """Write one line of the worker's standard error to the log."""
        self.log.write(line + "\n")
        self._stderr.append(line[:LONGEST])
        del self._stderr[:-20]

    def result(self, returncode: int) -> Mapping[str, JsonValue]:
        """Return the worker's result; raises its error, or one that explains a missing result."""
        self.log.flush()
        if self._error is not None:
            if self._error.exit_code == 1:
                self._error.hint = f"{self._error.hint}: {self.log.name}"
            raise self._error
        if self._result is not None and returncode == 0:
            return self._result
        name = self.job.kind
        if returncode in _KILLED:
            error = out_of_memory(self.job, "was killed, most likely because memory ran out")
            raise EnvironmentFailure(
                error.message + self._at(), hint=f"{error.hint}; log: {self.log.name}"
            )
        last = self._stderr[-1] if self._stderr else "it printed nothing"
        if limited := too_many_processes(last):
            raise limited
        raise WeightsmithError(
            f"the {name} job ended without a result ({describe_exit(returncode)}): {last}",
            hint=f"its log is {self.log.name}",
        )

    @contextmanager
    def in_time(self) -> Iterator[Conversation]:
        """If the block exceeds its time limit, say what the job was doing."""
        try:
            yield self
        except TookTooLong:
            self.log.flush()
            hours, minutes = divmod(self.job.seconds // 60, 60)
            span = f"{hours} h {minutes} min" if hours else f"{minutes} minutes"
            if self.job.seconds < 120:
                span = f"{self.job.seconds} seconds"
            raise EnvironmentFailure(
                f"the {self.job.kind} job was ended after {span}, the most "
                f"that it may take{self._at() or '; it was at: its start'}",
                hint=f"if it hangs there, use another input; if it is only slow, set {VARIABLE} to "
                f"another limit; log: {self.log.name}",
            ) from None

    def _with_host_paths(self, text: str) -> str:
        if not self.inside:
            return text
        pattern = rf"(?<![\w./]){re.escape(self.inside)}/([\w-]+)"
        inputs = self.job.inputs
        return re.sub(pattern, lambda m: str(inputs[m[1]].path if m[1] in inputs else m[0]), text)

    def _at(self) -> str:
        at = ", ".join(text for text in (self._doing or self._noted, self._done) if text)
        return f"; it was at: {at}" if at else ""


@contextmanager
def open_log(cache: Path, name: str) -> Iterator[TextIO]:
    """Open a new log file below the cache folder; only the last ones written are kept."""
    folder = private(cache, "logs")
    for old in sorted(folder.glob("*.log"), key=_written)[:-_LOGS_KEPT]:
        old.unlink(missing_ok=True)
    stamp = time.strftime("%Y%m%dT%H%M%S")
    path = folder / f"{stamp}-{secrets.token_hex(4)}-{name}.log"
    # Only its owner can read it: it contains answers.
    with open(
        path,
        "x",
        encoding="utf-8",
        buffering=1,
        opener=lambda name, flags: os.open(name, flags | os.O_CLOEXEC, 0o600),
    ) as log:
        yield log


def logged_steps(
    log: TextIO, progress: Progress, step: re.Pattern[str], unit: str
) -> Callable[[str], None]:
    """Return what writes lines to a log, and reports those that `step` finds two numbers in."""

    def on_line(line: str) -> None:
        log.write(line + "\n")
        if found := step.match(line):
            progress.advance(int(found[1]), int(found[2]), unit)

    return on_line


def _written(path: Path) -> tuple[bool, float]:
    # By time, not by name: a long job's log has an old name and is still being written.
    try:
        return age_order(path.stat().st_mtime)
    except OSError:  # another process has removed it
        return False, 0.0
