"""Measures a model on calibration text."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightsmith.core.cpus import has_avx2
from weightsmith.core.errors import EnvironmentFailure
from weightsmith.core.jobs import CacheScalesJob
from weightsmith.core.safe_parse import parse
from weightsmith.core.values import Json, JsonValue
from weightsmith.worker.wire import Report

if TYPE_CHECKING:
    from weightsmith.quantizers.layerwise.sensitivity import Types


def importance(
    model: Path, texts: Sequence[Mapping[str, JsonValue]], file: Path, report: Report
) -> None:
    """Write the importance of a model's matrices to a file, which is whole as soon as it is there.

    Raises EnvironmentFailure where the bits would depend on the CPU although it has AVX2, and
    RuntimeError outside of an environment of `AVX2_LOOPS`.
    """
    from weightsmith.quantizers.layerwise import importance as measuring

    _require_same_bits()
    rows = rendered(model, texts)
    found = measuring.importance(
        model,
        [row["text"] for row in rows],
        sum(int(row["tokens"]) for row in rows),
        lambda done, total: report(done, total, "layers"),
    )
    with _whole(file) as partial:
        measuring.write_importance(partial, found)


def losses(
    model: Path,
    texts: Sequence[Mapping[str, JsonValue]],
    matrix: Path | None,
    file: Path,
    report: Report,
    types: Types,
) -> None:
    """Write what each type of each tensor loses, as JSON; raises as `importance` does.

    `matrix` is the importance that rows are rounded with.
    """
    from weightsmith.quantizers.gguf_importance import Importance, read_importance
    from weightsmith.quantizers.layerwise.sensitivity import sensitivities

    _require_same_bits()
    rows = rendered(model, texts)
    found = sensitivities(
        model,
        [row["text"] for row in rows],
        sum(int(row["tokens"]) for row in rows),
        read_importance(matrix) if matrix else Importance(),
        types,
        lambda done, total: report(done, total, "layers"),
    )
    with _whole(file) as partial:
        partial.write_text(json.dumps(found, sort_keys=True), encoding="utf-8")


@contextmanager
def _whole(file: Path) -> Iterator[Path]:
    """Yield a place to write to; the file is there once that is on the disk."""
    partial = file.with_name(f".{file.name}.partial")
    yield partial
    with partial.open("rb") as written:
        os.fsync(written.fileno())
    partial.rename(file)


def _require_same_bits() -> None:
    """Raise unless what is measured here has the same bits on every CPU with AVX2."""
    from weightsmith.forward import native

    if has_avx2() and not native.is_fast():
        raise EnvironmentFailure(
            "the importance matrix would depend on this CPU: weightsmith's kernels are missing",
            hint="a warning above says why they could not be compiled; `imatrix: auto` needs none",
        )
    torch: Any = importlib.import_module("torch")
    loops = torch.backends.cpu.get_cpu_capability()
    if has_avx2() and loops != "AVX2":
        raise RuntimeError(f"the importance matrix would depend on this CPU: torch runs {loops}")


def cache_scales(job: CacheScalesJob, report: Report) -> Mapping[str, JsonValue]:
    """Return `scales`: of keys and of values, by the attention's name."""
    from weightsmith.quantizers.layerwise import maxima

    found = maxima.cache_scales(
        job.model.path,
        [row["text"] for row in rendered(job.model.path, job.texts)],
        lambda done, total: report(done, total, "layers"),
    )
    return {"scales": {name: list(pair) for name, pair in found.items()}}


def rendered(model: Path, texts: Sequence[Mapping[str, JsonValue]]) -> list[Mapping[str, Json]]:
    """Return each text as the model reads it, with its number of tokens."""
    from weightsmith.quantizers.quality.texts import as_lines

    return [parse(line) for line in as_lines(model, texts).splitlines()]
