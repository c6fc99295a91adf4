"""Weights of an input that has none: computed here, and in the programs that a job starts."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from weightsmith.core.jobs import Job, read_job, write_job
from weightsmith.models.safetensors import read_header
from weightsmith.models.tensors import has_no_data

_VARIABLE = "WEIGHTSMITH_JOB"
_FILE = ".job.json"


@contextmanager
def computed(job: Job, *, compared: bool = False) -> Iterator[None]:
    """Let the job read the weights of its inputs without any, while the block runs.

    They may be `compared` with the merge's digests at the end, which reads all that the block did
    not; raises InputRefused if they differ.
    """
    if job.virtual is None:
        yield
        return
    from weightsmith.merging.virtual import opened

    own, given = job.virtual, job.virtual.inputs.keys()
    folders = {one.path for name, one in job.inputs.items() if name not in given}
    with ExitStack() as stack:
        for folder in folders:
            files = folder.glob("*.safetensors") if folder.is_dir() else ()
            if any(has_no_data(read_header(path)) for path in files):
                digests = own.digests if compared else {}
                made = opened(folder, own.base.path, own.weighted, own.options, digests)
                stack.enter_context(made)
        yield


@contextmanager
def described(job: Job) -> Iterator[Mapping[str, str]]:
    """Yield the variables by which programs that the job starts can compute weights, too."""
    file = job.output / _FILE
    if job.virtual is None:
        file.unlink(missing_ok=True)  # of an interrupted run
        yield {}
        return
    file.write_text(write_job(job), encoding="utf-8")
    yield {_VARIABLE: str(file)}
    file.unlink()


@contextmanager
def computed_for_program(*, compared: bool = True) -> Iterator[Mapping[str, float]]:
    """Let a program of the job read those weights, all of them if they are `compared`.

    Yields the largest magnitudes of matrices that the merge has recorded.
    """
    if not (file := os.environ.get(_VARIABLE)):
        yield {}
        return
    job = read_job(Path(file).read_text("utf-8"))
    with computed(job, compared=compared):
        yield job.virtual.largest if job.virtual else {}
