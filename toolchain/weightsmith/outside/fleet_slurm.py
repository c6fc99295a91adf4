"""A fleet under Slurm: arrays of jobs, one element for each task, by its own commands."""

from __future__ import annotations

import os
import shlex
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from weightsmith.core.errors import EnvironmentFailure
from weightsmith.core.files import replace_file
from weightsmith.core.ports import Ended, NodeTask
from weightsmith.outside import process

_ARRAY = 1000
"""Elements of one array; MaxArraySize is 1001 unless a site changes it."""
_POLL = 0.5
_ASK = 5.0
"""Seconds between two questions to the controller; replies are seen without it."""
_GONE = 3
"""How often a task must be missing before it counts as lost: files may arrive late."""
_ALIVE = frozenset(
    {"PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "REQUEUED"}
    | {"REQUEUE_HOLD", "REQUEUE_FED", "RESIZING", "SIGNALING", "STAGE_OUT"}
)
_SCRIPT = """#!/bin/sh
cd {folder} || exit 5
task=$SLURM_ARRAY_TASK_ID
echo "$SLURMD_NODENAME" > $task.node
{program} < $task.request > $task.part
code=$?
[ -s $task.part ] && mv $task.part $task.reply
exit $code
"""


@dataclass(slots=True)
class _Given:
    work: NodeTask
    job: str
    folder: Path
    number: int
    missing: int = 0

    def file(self, kind: str) -> Path:
        return self.folder / f"{self.number}.{kind}"

    @property
    def node(self) -> str:
        try:
            return self.file("node").read_text("utf-8").strip()
        except OSError:
            return ""


@dataclass(slots=True)
class SlurmFleet:
    """Runs each task as an element of a job array."""

    argv: Sequence[str]
    """The program of a node, at the same path on all of them."""
    folder: Path
    """For requests, replies and logs; on a file system that all nodes share."""
    name: str = "slurm"
    remote: bool = True
    _given: dict[str, _Given] = field(default_factory=dict)
    _impossible: list[Ended] = field(default_factory=list)
    _jobs: list[str] = field(default_factory=list)
    _asked: float = 0.0
    _gpus: bool = False

    def check(self, version: str) -> None:
        """Ask the controller; each task compares the version itself.

        Raises EnvironmentFailure if Slurm's commands are missing or nothing answers.
        """
        del version
        if shutil.which("sbatch") is None:
            raise EnvironmentFailure(
                "--on slurm needs Slurm's commands, and there is no sbatch here",
                hint="run it on a login node of the cluster",
            )
        self._gpus = "gpu" in self._run("sinfo", "--noheader", "--format=%G")

    def submit(self, works: Sequence[NodeTask]) -> None:
        """Submit an array for each kind of needs."""
        alike: dict[tuple[int, int, int, frozenset[str]], list[NodeTask]] = {}
        for work in works:
            gpus = work.gpus if self._gpus else 0
            alike.setdefault((work.cpus, work.memory_bytes, gpus, work.avoid), []).append(work)
        for group in alike.values():
            for start in range(0, len(group), _ARRAY):
                self._submit(group[start : start + _ARRAY])

    def _submit(self, works: Sequence[NodeTask]) -> None:
        folder = self.folder / f"{len(self._jobs)}-{time.time_ns():x}"
        folder.mkdir(parents=True)
        for number, work in enumerate(works):
            # For this user alone: a judge's arguments, which are in no report, may hold a key.
            replace_file(folder / f"{number}.request", (work.text.encode(),), mode=0o600)
        script = _SCRIPT.format(folder=shlex.quote(str(folder)), program=shlex.join(self.argv))
        first = works[0]
        words = [
            "sbatch",
            "--parsable",
            f"--array=0-{len(works) - 1}",
            f"--cpus-per-task={first.cpus}",
            f"--mem={-(-first.memory_bytes // (1 << 20))}M",
            "--no-requeue",  # the fleet tries again itself, and says so
            "--job-name=weightsmith-fleet",
            f"--output={str(folder).replace('%', '%%')}/%a.log",
            "--open-mode=append",
        ]
        if self._gpus and first.gpus:
            words.append(f"--gres=gpu:{first.gpus}")
        if first.avoid:
            words.append(f"--exclude={','.join(sorted(first.avoid))}")
        try:
            job = self._run(*words, text=script).strip().partition(";")[0]
        except EnvironmentFailure as error:
            # Without the nodes to avoid there may be none left; or none has that much.
            if first.avoid:
                return self._submit([replace(work, avoid=frozenset()) for work in works])
            why = error.message
            self._impossible += [Ended(id=w.id, node="", text="", why=why) for w in works]
            return None
        self._jobs.append(job)
        for number, work in enumerate(works):
            self._given[work.id] = _Given(work=work, job=job, folder=folder, number=number)
        return None

    def wait(self, seconds: float) -> Sequence[Ended]:
        """Return the tasks that have ended since; wait for one at most so many seconds."""
        if self._impossible:
            found, self._impossible = self._impossible, []
            return found
        until = time.monotonic() + seconds
        while True:
            ended = []
            for key, given in list(self._given.items()):
                if given.file("reply").is_file():
                    text = given.file("reply").read_text("utf-8", errors="replace").strip()
                    self._forget(key)
                    last = text.splitlines()[-1] if text else ""
                    ended.append(Ended(id=key, node=given.node, text=last))
            if self._given and time.monotonic() - self._asked >= _ASK:
                self._asked = time.monotonic()
                ended += self._lost()
            left = until - time.monotonic()
            if ended or left <= 0:
                return ended
            time.sleep(min(_POLL, left))

    def _lost(self) -> Iterator[Ended]:
        states = self._states()
        for key, given in list(self._given.items()):
            state = states.get(f"{given.job}_{given.number}", "gone")
            given.missing = 0 if state in _ALIVE else given.missing + 1
            if given.missing >= _GONE and not given.file("reply").is_file():
                self._forget(key)
                why = f"Slurm ended it without a reply ({state.lower()})"
                with suppress(OSError):
                    log = given.file("log").read_text("utf-8", errors="replace").strip()
                    why += f": {log.splitlines()[-1]}" if log else ""
                yield Ended(id=key, node=given.node, text="", why=why)

    def _states(self) -> Mapping[str, str]:
        jobs = ",".join(dict.fromkeys(given.job for given in self._given.values()))
        try:
            text = self._run(
                "squeue", "--noheader", "--array", "--states=all", f"--jobs={jobs}",
                "--format=%i %T",
            )  # fmt: skip
        except EnvironmentFailure as error:
            if "Invalid job id" in error.message:  # all of them have ended long ago
                return {}
            return {f"{g.job}_{g.number}": "PENDING" for g in self._given.values()}
        rows = (line.split() for line in text.splitlines())
        return {row[0]: row[1] for row in rows if len(row) == 2}

    def running(self) -> frozenset[str]:
        """Return the ids of the tasks that have begun on a node."""
        return frozenset(key for key, given in self._given.items() if given.file("node").is_file())

    def close(self) -> None:
        """Cancel every job that has not ended."""
        jobs = dict.fromkeys(given.job for given in self._given.values())
        for key in list(self._given):
            self._forget(key)
        if jobs:
            self._run("scancel", *jobs)

    def _forget(self, key: str) -> None:
        self._given.pop(key).file("request").unlink(missing_ok=True)

    def _run(self, *words: str, text: str = "") -> str:
        lines: list[str] = []
        done = process.run(
            words,
            env=dict(os.environ),  # which Slurm passes on to the task
            input=text.encode() if text else None,
            on_line=lines.append,
            on_error_line=lambda _: None,
            timeout=120.0,
        )
        done.require(words[0], hint="check the cluster with `sinfo` and `squeue`")
        return "\n".join(lines)
