"""Runs the jobs that measure a model on calibration text."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from weightsmith.cpus import has_avx2
from weightsmith.errors import EnvironmentFailure
from weightsmith.foreign import parse
from weightsmith.jobs import CacheScalesJob, ImportanceJob
from weightsmith.values import Json

Report = Callable[[int, int, str], None]


def importance(job: ImportanceJob, report: Report) -> Mapping[str, Json]:
    """Write the file; return how much text it was measured on.

    Raises EnvironmentFailure where the bits would depend on the CPU although it has AVX2.
    """
    native: Any = importlib.import_module("weightsmith.forward.native")
    if has_avx2() and not native.is_fast():
        raise EnvironmentFailure(
            "the importance matrix would depend on this CPU: weightsmith's kernels are missing",
            hint="a warning above says why they could not be compiled; `imatrix: auto` needs none",
        )
    module: Any = importlib.import_module("weightsmith.quantizers.layerwise.importance")
    rows = _rendered(job)
    found = module.importance(
        job.model.path,
        [row["text"] for row in rows],
        sum(int(row["tokens"]) for row in rows),
        lambda done, total: report(done, total, "layers"),
    )
    module.write_importance(job.output / job.file, found)
    return {"chunks": found.chunks, "window": found.window}


def cache_scales(job: CacheScalesJob, report: Report) -> Mapping[str, Json]:
    """Return `scales`: of keys and of values, by the attention's name."""
    module: Any = importlib.import_module("weightsmith.quantizers.layerwise.cache")
    found = module.cache_scales(
        job.model.path,
        [row["text"] for row in _rendered(job)],
        lambda done, total: report(done, total, "layers"),
    )
    return {"scales": {name: list(pair) for name, pair in found.items()}}


def _rendered(job: CacheScalesJob | ImportanceJob) -> list[Mapping[str, Json]]:
    """Return each text as the model reads it, with its number of tokens."""
    rendering: Any = importlib.import_module("weightsmith.quality.texts")
    lines = rendering.as_lines(job.model.path, job.texts).splitlines()
    return [parse(line) for line in lines]
