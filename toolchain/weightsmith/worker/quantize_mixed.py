"""Program that measures losses, chooses a type for each matrix, and writes a mix for vLLM.

python -m weightsmith.worker.quantize_mixed SETTINGS
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from weightsmith.core.cpus import AVX2_LOOPS, has_avx2
from weightsmith.core.safe_parse import parse, read_json
from weightsmith.core.trees import discard
from weightsmith.core.values import JsonValue
from weightsmith.models.tensors import CheckpointTensors
from weightsmith.outside.hardware import cores
from weightsmith.quantizers import checkpoints, writing
from weightsmith.quantizers.compressed_mix import (
    FP8,
    PLAIN,
    TYPES,
    MixSettings,
    choose,
    config_of,
    has_zeros,
    types_of,
    unit_of,
)
from weightsmith.quantizers.matrices import Floats, matrices, unquantized
from weightsmith.quantizers.rounded import FusedRows, work_of
from weightsmith.quantizers.rounding import round_rows
from weightsmith.quantizers.running import FACTS, RAW, progress_line, refusals
from weightsmith.worker.calibrating import importance, losses, rendered
from weightsmith.worker.virtual import computed_for_program

if TYPE_CHECKING:
    from weightsmith.quantizers.layerwise.quantizing import Groups


def main() -> None:
    """Make a mix as set in the settings file."""
    settings = MixSettings(**read_json(Path(sys.argv[1])))
    if has_avx2():
        os.environ.update(AVX2_LOOPS)  # before torch is imported
    with refusals():
        with computed_for_program(compared=False):
            _measure(settings)
        with computed_for_program():
            _write(settings)


def _measure(settings: MixSettings) -> None:
    """Write the importance and the losses that are not there yet."""
    from weightsmith.quantizers.layerwise.sensitivity import Types

    def tell(done: int, total: int, unit: str) -> None:
        print(progress_line(done, total, unit), flush=True)  # noqa: T201

    rows = _texts(settings)
    model, matrix = Path(settings.measured_on), Path(settings.matrix) if settings.matrix else None
    if matrix and not matrix.is_file():
        importance(model, rows, matrix, tell)
    if settings.losses and not Path(settings.losses).is_file():
        # Embedding and head stay in 16 bits.
        types = Types(
            lambda name, n: types_of(n, experts="_exps." in name) if name[:4] == "blk." else (),
            rounded,
            lambda kind: kind != "fp8",
        )
        losses(model, rows, matrix, Path(settings.losses), tell, types)


def _write(settings: MixSettings) -> None:
    from weightsmith.quantizers.layerwise.quantizing import integers

    model, out = Path(settings.model), Path(settings.out)
    source = CheckpointTensors(model)
    known = matrices(source, model)
    measured = read_json(Path(settings.losses)) if settings.losses else {}
    mix = choose(settings.wanted, source, model, measured)
    types = {one: mix.types[unit_of(one)] for one in known}
    found = [one for one in known if types[one] != PLAIN]
    rows = FusedRows(source, FP8, found, {})
    works = [work_of(one, FP8, rows) for one in found if types[one] == "fp8"]
    told: Mapping[str, JsonValue] = {}
    if groups := {one: _groups(types[one]) for one in found if types[one] != "fp8"}:
        lines = [str(row["text"]) for row in rendered(model, _texts(settings))]
        made, told = integers(model, out / RAW, lines, groups)
        works += made
    quantized = {one.tensor for one in found}
    works += [writing.copied(source, name) for name in source.names - quantized]
    writing.write_checkpoint(out, works, cores())
    modules = {one.module: types[one] for one in found}
    ignored = ["lm_head", *unquantized(source, known, found)]
    checkpoints.write_companions(model, out, {**config_of(modules), "ignore": ignored})
    facts = {**asdict(mix), "walk": told}
    (out / FACTS).write_text(json.dumps(facts), encoding="utf-8")
    discard(out / RAW)


def rounded(kind: str, rows: Floats, importance: Floats | None) -> Floats:
    """Return float32 rows [n, inputs] as they are read in a type, without making up for errors."""
    if kind != "fp8":
        from weightsmith.quantizers.layerwise.quantizing import nearest

        return nearest(rows, _groups(kind), importance)
    codes, scales = round_rows(rows, FP8)
    return np.asarray(codes.astype(np.float32) * scales.astype(np.float32), np.float32)


def _groups(kind: str) -> Groups:
    from weightsmith.quantizers.layerwise.quantizing import Groups

    return Groups(TYPES[kind].tile[1], symmetric=not has_zeros(kind))


def _texts(settings: MixSettings) -> list[Mapping[str, JsonValue]]:
    lines = Path(settings.texts).read_text("utf-8").splitlines()
    return [parse(line) for line in lines]


if __name__ == "__main__":
    main()
