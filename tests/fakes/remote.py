"""A runner on another machine: what crosses is a job's text, files by their digests, the output."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp

from weightsmith.core.errors import EnvironmentFailure
from weightsmith.core.job_inputs import Input
from weightsmith.core.jobs import Job, read_job, write_job
from weightsmith.core.ports import Progress, Runner
from weightsmith.core.values import Digest, FileEntry, Json


@dataclass
class RemoteRunner:
    """Runs jobs on a `machine` (a folder) that never reads the paths that a job names here."""

    inner: Runner
    machine: Path
    name: str = "remote"
    networked: bool = False

    def prepare(self, builder: str, progress: Progress) -> None:
        self.inner.prepare(builder, progress)

    def check(self, builder: str) -> None:
        self.inner.check(builder)

    def ready(self, builder: str) -> bool:
        return self.inner.ready(builder)

    def run(self, job: Job, progress: Progress, *, stop: int | None = None) -> Mapping[str, Json]:
        sent = {name: self._send(given) for name, given in job.inputs.items()}
        there = read_job(write_job(job.at(sent, job.output)))
        self.machine.mkdir(exist_ok=True)
        place = Path(mkdtemp(dir=self.machine, prefix="job-"))
        fetched = {n: self._fetch(given, place / n) for n, given in there.inputs.items()}
        shutil.copytree(job.output, place / "out")  # a job may resume what another one left
        result = self.inner.run(there.at(fetched, place / "out"), progress)
        shutil.copytree(place / "out", job.output, dirs_exist_ok=True)
        return result

    def _send(self, given: Input) -> Input:
        """Bring the files that the machine lacks; a reference without content is read for that."""
        given = given if given.files is not None else read_input(given.path)
        blobs = self.machine / "blobs"
        blobs.mkdir(parents=True, exist_ok=True)
        for entry in given.files or ():
            if not (blobs / entry.digest.hex).exists():
                shutil.copyfile(given.path / entry.path, blobs / entry.digest.hex)
        return given

    def _fetch(self, given: Input, place: Path) -> Input:
        """Lay an input out from what was sent, by its reference alone, and check each file."""
        for entry in given.files or ():
            data = (self.machine / "blobs" / entry.digest.hex).read_bytes()
            if (Digest.of(data), len(data)) != (entry.digest, entry.size):
                raise EnvironmentFailure(f"{entry.path} changed on the way", hint="try again")
            (place / entry.path).parent.mkdir(parents=True, exist_ok=True)
            (place / entry.path).write_bytes(data)
        return given.at(place)


def read_input(path: Path) -> Input:
    """Return a reference to what lies at a path, every file of it read."""
    found = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    data = {str(each.relative_to(path)): each.read_bytes() for each in found}
    return Input(
        path=path,
        files=tuple(
            FileEntry(path=name, size=len(read), digest=Digest.of(read))
            for name, read in data.items()
        ),
    )
