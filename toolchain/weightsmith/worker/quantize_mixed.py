"""Program that measures losses, chooses a type for each matrix, and writes a mix for vLLM.

python -m weightsmith.worker.quantize_mixed SETTINGS
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
import numpy.typing as npt

from weightsmith.core.cpus import AVX2_LOOPS, has_avx2
from weightsmith.core.safe_parse import parse, read_json
from weightsmith.models.tensors import CheckpointTensors, widened
from weightsmith.outside.hardware import cores
from weightsmith.quantizers import checkpoints, writing
from weightsmith.quantizers.compressed_mix import (
    FP8,
    PLAIN,
    TYPES,
    MixSettings,
    choose,
    config_of,
    rounded,
    tensor_of,
    types_of,
    unit_of,
)
from weightsmith.quantizers.gguf_importance import Importance, read_importance
from weightsmith.quantizers.int4 import pack, round_groups, scales_type
from weightsmith.quantizers.matrices import Floats, Matrix, matrices, unquantized
from weightsmith.quantizers.rounded import FusedRows, work_of
from weightsmith.quantizers.running import FACTS, progress_line, refusals
from weightsmith.worker.calibrating import importance, losses
from weightsmith.worker.virtual import computed_for_program


def main() -> None:
    """Make a mix as set in the settings file."""
    settings = MixSettings(**read_json(Path(sys.argv[1])))
    if has_avx2():
        os.environ.update(AVX2_LOOPS)  # before torch is imported
    with refusals():
        if settings.texts:
            with computed_for_program(compared=False):
                _measure(settings)
        with computed_for_program():
            _write(settings)


def _measure(settings: MixSettings) -> None:
    """Write the importance and the losses that are not there yet."""
    from weightsmith.quantizers.layerwise.sensitivity import Types

    def tell(done: int, total: int, unit: str) -> None:
        print(progress_line(done, total, unit), flush=True)  # noqa: T201

    rows = [parse(line) for line in Path(settings.texts).read_text("utf-8").splitlines()]
    model, matrix = Path(settings.measured_on), Path(settings.matrix) if settings.matrix else None
    if matrix and not matrix.is_file():
        importance(model, rows, matrix, tell)
    if settings.losses and not Path(settings.losses).is_file():
        # Embedding and head stay in 16 bits.
        types = Types(lambda name, n: types_of(n) if name.startswith("blk.") else (), rounded)
        losses(model, rows, matrix, Path(settings.losses), tell, types)


def _write(settings: MixSettings) -> None:
    model, out = Path(settings.model), Path(settings.out)
    source = CheckpointTensors(model)
    known = matrices(source, model)
    measured = read_json(Path(settings.losses)) if settings.losses else {}
    mix = choose(settings.wanted, source, model, measured)
    weighed = read_importance(Path(settings.matrix)) if settings.matrix else Importance()
    found = [one for one in known if mix.types[unit_of(one)] != PLAIN]
    rows = FusedRows(source, FP8, found, {})
    experts: dict[str, int] = {}  # matrices of a tensor of all experts
    for one in known:
        name = tensor_of(one)
        experts[name] = max(experts.get(name, 0), 1 + _expert(one))
    works = []
    for one in found:
        kind = mix.types[unit_of(one)]
        if kind == "fp8":
            works.append(work_of(one, FP8, rows))
        else:
            works.append(_integers(one, source, rows, kind, _importance(one, weighed, experts)))
    quantized = {one.tensor for one in found}
    works += [writing.copied(source, name) for name in source.names - quantized]
    writing.write_checkpoint(out, works, cores())
    modules = {one.module: mix.types[unit_of(one)] for one in found}
    ignored = ["lm_head", *unquantized(source, known, found)]
    checkpoints.write_companions(model, out, {**config_of(modules), "ignore": ignored})
    (out / FACTS).write_text(json.dumps(asdict(mix)), encoding="utf-8")


def _importance(matrix: Matrix, weighed: Importance, experts: Mapping[str, int]) -> Floats | None:
    """Return what errors of a matrix's inputs count, or None if it was not measured."""
    name = tensor_of(matrix)
    values = weighed.of(name, matrix.inputs, experts[name])
    return None if values is None else values[_expert(matrix)]


def _expert(matrix: Matrix) -> int:
    """Return the number of an expert's matrix; 0 for another."""
    return int(matrix.module.partition(".experts.")[2].partition(".")[0] or 0)


def _integers(
    matrix: Matrix,
    source: CheckpointTensors,
    rows: FusedRows,
    kind: str,
    weighed: Floats | None,
) -> writing.TensorGroup:
    """Return the work for a matrix of 4-bit integers."""
    group, scales = TYPES[kind].tile[1], scales_type(source.info(matrix.tensor).dtype)
    weight, shape = f"{matrix.module}.weight", (matrix.outputs, matrix.inputs)
    outputs = (
        writing.OutputTensor(f"{weight}_packed", "I32", (shape[0], shape[1] // 8)),
        writing.OutputTensor(f"{weight}_scale", scales, (shape[0], shape[1] // group)),
        writing.OutputTensor(f"{weight}_shape", "I64", (2,)),
    )

    def blocks() -> Iterator[tuple[str, npt.NDArray[np.generic]]]:
        yield f"{weight}_shape", np.array(shape, np.int64)
        for some in rows.blocks(matrix):
            try:
                codes, found = round_groups(widened(some), group, scales, weighed)
            except ValueError:
                raise checkpoints.not_finite(matrix.tensor) from None
            yield f"{weight}_packed", pack(codes)
            yield f"{weight}_scale", found

    return writing.TensorGroup(outputs, blocks)


if __name__ == "__main__":
    main()
