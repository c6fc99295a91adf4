"""Runs the commands of a quantization in order, and resumes an interrupted run."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import sys
from collections.abc import Mapping, Sequence
from itertools import dropwhile
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from weightsmith.core.errors import EnvironmentFailure, InputRefused, from_code
from weightsmith.core.safe_parse import parse
from weightsmith.core.trees import below
from weightsmith.outside import process
from weightsmith.quantizers.gguf_header import is_whole
from weightsmith.quantizers.running import PROGRESS, REFUSED
from weightsmith.worker.wire import Report, note

if TYPE_CHECKING:
    from weightsmith.quantizers.quantizer import BuilderCommand

_DONE = ".done"
"""One file for all steps: forgetting half of them would leave a step without its input."""
_NO_MEMORY = ("std::bad_alloc", "MemoryError", "can't allocate memory", "Cannot allocate memory")
_NO_ROOM = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT))
_TRACEBACK = "Traceback (most recent call last):"
_EXCEPTION = re.compile(r"(?:[\w.]+\.)?(\w+)(?::.*)?")
"""The line after a traceback's frames."""
_NOT_OF_INPUT = re.compile(
    r"Fault|KeyboardInterrupt|(OS|IO|Memory|Permission|BrokenPipe|Timeout|Interrupted|BlockingIO"
    r"|Connection\w*|Import|ModuleNotFound)Error"
)
"""Exceptions of ours, of the machine or of its builder."""
_LOGGED = re.compile(r"ERROR:[\w.-]+:\s*(.+)")
"""What the converter says before it exits without an exception."""
_LONGEST = 300


def run_steps(
    steps: tuple[BuilderCommand, ...],
    output: Path,
    report: Report,
    variables: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Run the commands in order, except those that an interrupted run finished.

    `variables` are added to each command's environment. Raises MemoryError or OSError for a program
    that lacked memory or room on the disk, else the error that it reports or EnvironmentFailure,
    also for one that did not write what it makes.
    """
    done = output / _DONE
    known = done.read_text("utf-8").splitlines() if done.is_file() else []
    # What keeps libraries offline, limits their threads and names tools.
    prefixes = ("HF_", "TRANSFORMERS_", "OMP_", "PYTHON", "TMPDIR", "WEIGHTSMITH_TOOLS_")
    inherited = {name: value for name, value in os.environ.items() if name.startswith(prefixes)}

    def show(line: str) -> None:
        if found := PROGRESS.fullmatch(line):
            report(int(found[1]), int(found[2]), found[3])
        else:  # for the log
            print(line, file=sys.stderr, flush=True)  # noqa: T201

    for number, step in enumerate(steps):
        report(number, len(steps), "steps")
        argv = _filled(step, output)
        mark = json.dumps([number, *argv])
        if mark in known:
            note(f"{step.title}: already done")
            continue
        note(step.title)
        for path, text in step.writes.items():
            path.write_text(text, encoding="utf-8")
        print(f"$ {' '.join(argv)}", file=sys.stderr, flush=True)  # noqa: T201
        environment = process.scrubbed({**inherited, **step.env, **variables})
        ended = process.run(argv, cwd=output, env=environment, on_line=show)
        if ended.returncode:
            _refuse(step, ended)
        ended.require(
            f"{step.title} ({Path(step.argv[0]).name})",
            hint="the lines above are the program's own; the job's log has all of them",
        )
        if step.makes and not is_whole(step.makes):  # llama-imatrix only logs a full disk
            raise EnvironmentFailure(
                f"{step.title}: {Path(step.argv[0]).name} did not write the whole of "
                f"{step.makes.name}",
                hint="free some space on the disk of the output, then run it again; the job's log "
                "has what the program said",
            )
        # What a step wrote is on the disk before the mark: programs of others do not wait for that.
        for path in below(output):
            if path.is_file() and not path.is_symlink():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        # Marked before its inputs are deleted: a run that is killed in between can be resumed.
        with done.open("a", encoding="utf-8") as marks:
            marks.write(mark + "\n")
        for path in step.removes:
            for found in path.parent.glob(path.name):
                found.unlink()
    report(len(steps), len(steps), "steps")


def _refuse(step: BuilderCommand, ended: process.Completed) -> None:
    """Raise what a program lacked, the error of its last line, or what it says of the input."""

    def says(any_of: tuple[str, ...]) -> bool:
        return any(words in line for line in ended.tail[-20:] for words in any_of)

    if ended.returncode == -signal.SIGKILL or says(_NO_MEMORY):  # the kernel kills for memory
        raise MemoryError(step.title)
    if says(_NO_ROOM):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    last = next((line.strip() for line in reversed(ended.tail) if line.strip()), "")
    if last.startswith(REFUSED):
        message, hint = parse(last.removeprefix(REFUSED))
        raise from_code(ended.returncode, message, hint)
    if step.reads and (why := _complaint(ended.tail)):
        raise InputRefused(
            f"{step.title}: the converter cannot read {step.reads}: {why}",
            hint="the job's log has the traceback; try another engine, such as target vllm",
        )


def _complaint(tail: Sequence[str]) -> str:
    """Return what a program of Python says against its input at its end, in one line.

    That is the message of its last exception, which may have several lines, or the last error that
    it logged. Empty if it says nothing, or something about the machine.
    """
    lines = [line.rstrip() for line in tail if line.strip()]
    if not lines:
        return ""
    if logged := _LOGGED.fullmatch(lines[-1]):
        return logged[1][:_LONGEST]
    starts = [number for number, line in enumerate(lines) if line == _TRACEBACK]
    after = lines[starts[-1] + 1 :] if starts else lines[-1:]
    # Frames are indented, the first line of the message is not.
    message = [*dropwhile(lambda line: line[0].isspace(), after)]
    found = _EXCEPTION.fullmatch(message[0]) if message else None
    if not found or _NOT_OF_INPUT.fullmatch(found[1]):
        return ""
    if not starts and not found[1].endswith("Error"):
        return ""
    return " ".join(line.strip() for line in message)[:_LONGEST]


def _filled(step: BuilderCommand, output: Path) -> tuple[str, ...]:
    """Return a command in which each `{name}` is replaced by a file's path."""
    found = {f"{{{name}}}": pattern for name, pattern in step.finds.items()}
    words = []
    for word in step.argv:
        for name, pattern in found.items():
            if name in word and (first := min(output.glob(pattern), default=None)):
                word = word.replace(name, str(first))
        words.append(word)
    return tuple(words)


def forget_steps(output: Path) -> None:
    """Make the next run repeat every step."""
    (output / _DONE).unlink(missing_ok=True)
