"""Formats without calibration: weights are rounded a few rows at a time, with a scale per tile.

The layouts are compressed-tensors' (`schemes.py`). Codes and scales are written as they are
computed, so the checkpoint may be larger than memory.

llm-compressor would load the model to compute what each matrix alone decides. Experts become single
matrices, because compressed-tensors defines scales for these only. gpt-oss's stay stacked, in
OpenAI's layout: vLLM reads them in that and in 16 bits, in no other.

NVFP4 needs the largest weight of fused matrices before it rounds their first row. A merge computes
every weight anyway and records it; if the rows have another one when they are rounded, the job
ends. Matrices without a record are read before, and kept up to 256 MiB.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from weightsmith.core.errors import EnvironmentFailure, InputRefused
from weightsmith.core.values import Format
from weightsmith.models.facts import read_facts
from weightsmith.models.tensors import CheckpointTensors, array_type, largest
from weightsmith.quantizers import checkpoints, running, writing
from weightsmith.quantizers.matrices import Matrix, matrices, unquantized
from weightsmith.quantizers.packed import PackedLayout, view_of
from weightsmith.quantizers.packed_check import checked
from weightsmith.quantizers.quantizer import Options, Quantizer
from weightsmith.quantizers.rounding import fused_scale, round_rows
from weightsmith.quantizers.schemes import SCHEMES, Scheme, stored_as

_EXPERT = re.compile(r"\.experts\.\d+\.")
_BLOCK = 1 << 20
"""Weights that are rounded at a time: few enough for the CPU's cache."""
KEPT_ROWS = 256 << 20
"""Bytes of rows that are kept for their second use, with a fused scale: gate and up of a model of 8
billion weights in bfloat16."""


def options(_format: Format, requested: Options) -> Options:
    """Return the recipe's options that affect the output."""
    return {"keep": checkpoints.keep_option(requested)}


def quantize(
    scheme: Scheme,
    model: Path,
    out: Path,
    keep: Sequence[str],
    inputs: Mapping[str, float] = MappingProxyType({}),
    recorded: Mapping[str, float] = MappingProxyType({}),
    threads: int = 1,
) -> None:
    """Write a model's checkpoint in a scheme's format, except the matrices in `keep`.

    `inputs` has the largest magnitude of each module's inputs, for a scheme that needs it;
    `recorded` that of tensors' weights, where it is known before they are read. Each thread rounds
    a matrix, or in turn those that share a scale.

    Raises InputRefused for matrices that the scheme's tiles do not divide, weights that are not
    finite, and what `without_kept` refuses; EnvironmentFailure if weights are not as recorded.
    """
    source, scheme = CheckpointTensors(model), stored_as(scheme, read_facts(model).architecture)
    known = matrices(source, model)
    found = checkpoints.without_kept(known, keep)
    for matrix in found:
        if scheme.whole_tiles and matrix.inputs % scheme.tile[1]:
            raise InputRefused(
                f"{matrix.module} has {matrix.inputs} inputs, no multiple of {scheme.tile[1]}",
                hint="choose fp8 or w8a8, which have a scale per row",
            )
    rows = FusedRows(source, scheme, found, recorded)
    if scheme.layout == "mxfp4":
        stacks: dict[str, list[Matrix]] = {}
        for matrix in sorted(found, key=lambda one: one.expert):
            stacks.setdefault(matrix.tensor, []).append(matrix)
        works = [_stack(name, experts, scheme, rows) for name, experts in stacks.items()]
    else:
        works = [work_of(matrix, scheme, rows) for matrix in found]
    if scheme.observed:
        works += _input_scales(scheme, found, inputs)
    quantized = {matrix.tensor for matrix in found}
    works += [writing.copied(source, name) for name in source.names - quantized]
    writing.write_checkpoint(out, works, threads)
    checkpoints.write_companions(model, out, scheme.config(unquantized(source, known, found)))


def _input_scales(
    scheme: Scheme, found: Sequence[Matrix], inputs: Mapping[str, float]
) -> Iterator[writing.TensorGroup]:
    """Yield the scales of inputs."""
    for module, most in shared_inputs(found, inputs).items():
        make = partial(np.full, 1, fused_scale(most, scheme), array_type("F32"))
        yield writing.whole(f"{module}.input_global_scale", "F32", (1,), make)


def shared_inputs(found: Sequence[Matrix], inputs: Mapping[str, float]) -> dict[str, float]:
    """Return the largest input of each module, and of those with which it has a scale in common.

    These are the matrices that engines fuse, and the same matrix of all experts.
    """
    sharing: dict[str, list[str]] = {}
    for matrix in found:
        sharing.setdefault(_EXPERT.sub(".experts.", matrix.fused), []).append(matrix.module)
    most = {place: max(inputs[one] for one in modules) for place, modules in sharing.items()}
    return {module: most[place] for place, modules in sharing.items() for module in modules}


class FusedRows:
    """The matrices' rows, and the scales that fused matrices share.

    Such a scale needs the largest weight of its matrices before the first row is rounded. Where
    that is not recorded, all rows are read before; what fits into memory is kept until then, and
    the rest is read or computed twice.
    """

    def __init__(
        self,
        source: CheckpointTensors,
        scheme: Scheme,
        found: Sequence[Matrix],
        recorded: Mapping[str, float],
    ) -> None:
        self._source, self._scheme = source, scheme
        self._recorded = recorded if scheme.fused_scale else {}
        self._parts: dict[str, list[Matrix]] = {}
        self._known: dict[str, float] = {}
        self._kept: dict[tuple[str, int], npt.NDArray[np.generic]] = {}
        self._room, self._lock = KEPT_ROWS, threading.Lock()
        for matrix in found:
            self._parts.setdefault(matrix.fused, []).append(matrix)

    def scale(self, matrix: Matrix) -> np.float32 | None:
        """Return the scale that a matrix shares with others, or None if the scheme has none."""
        if not self._scheme.fused_scale:
            return None
        return fused_scale(self.most(matrix), self._scheme)

    def most(self, matrix: Matrix) -> float:
        """Return the largest magnitude of a matrix and of those that engines fuse with it."""
        if matrix.fused not in self._known:
            self._known[matrix.fused] = max(map(self._largest_weight, self._parts[matrix.fused]))
        return self._known[matrix.fused]

    def rounded(
        self, matrix: Matrix, codes: str, scales: str
    ) -> Iterator[tuple[str, npt.NDArray[np.generic]]]:
        """Yield a matrix's codes and scales, with these names."""
        for rows in self.blocks(matrix):
            try:
                made, found = round_rows(rows, self._scheme, self.scale(matrix))
            except ValueError:
                raise checkpoints.not_finite(matrix.tensor) from None
            yield codes, made
            yield scales, found

    def blocks(self, matrix: Matrix) -> Iterator[npt.NDArray[np.generic]]:
        """Yield a matrix's rows in its own type, whole tiles of them at a time.

        Raises EnvironmentFailure after the last one if the largest weight is not as recorded, for
        which the scale would have been another.
        """
        recorded, most = self._known_most(matrix), 0.0
        for start, stop in self._spans(matrix):
            rows = self._kept.pop((matrix.module, start), None)
            if rows is None:
                rows = matrix.stored(self._source, start, stop)
            else:
                with self._lock:
                    self._room += rows.nbytes
            if recorded is not None:
                most = max(most, largest(rows))
            yield rows
        if recorded is not None and most != recorded:
            raise EnvironmentFailure(
                f"the largest weight of {matrix.tensor} is {most:g}, but {recorded:g} was recorded "
                "when it was merged",
                hint="memory or disk may be faulty: build again; if it recurs, delete what was "
                "recorded with `invoke clean`",
            )

    def _known_most(self, matrix: Matrix) -> float | None:
        """Return a matrix's recorded largest weight; None for a part of a stack."""
        return self._recorded.get(matrix.tensor) if matrix.expert < 0 else None

    def _largest_weight(self, matrix: Matrix) -> float:
        if (known := self._known_most(matrix)) is not None:
            return known
        most = 0.0
        for start, stop in self._spans(matrix):
            rows = matrix.stored(self._source, start, stop)
            most = max(most, largest(rows))
            with self._lock:
                if fits := rows.nbytes <= self._room:
                    self._room -= rows.nbytes
            if fits:
                self._kept[matrix.module, start] = rows
        return most

    def _spans(self, matrix: Matrix) -> Iterator[tuple[int, int]]:
        tile = self._scheme.tile[0]
        step = max(1, _BLOCK // matrix.inputs // tile) * tile
        for start in range(0, matrix.outputs, step):
            yield start, min(start + step, matrix.outputs)


def work_of(matrix: Matrix, scheme: Scheme, rows: FusedRows) -> writing.TensorGroup:
    """Return the work for a matrix of its own: its codes and scales."""
    weight = f"{matrix.module}.weight"
    codes = f"{weight}_packed" if scheme.packed else weight
    count, columns = matrix.outputs, matrix.inputs
    height, width = scheme.tile[0], scheme.tile[1] or columns
    tiles = -(-count // height), -(-columns // width)
    outputs = [
        writing.OutputTensor(codes, scheme.codes, (count, columns // (2 if scheme.packed else 1))),
        writing.OutputTensor(f"{weight}_scale", scheme.scales, tiles),
    ]
    if scheme.fused_scale:
        outputs.append(writing.OutputTensor(f"{weight}_global_scale", "F32", (1,)))

    def blocks() -> Iterator[tuple[str, npt.NDArray[np.generic]]]:
        shared = rows.scale(matrix)
        if shared is not None:
            yield f"{weight}_global_scale", np.array([shared], array_type("F32"))
        yield from rows.rounded(matrix, codes, f"{weight}_scale")

    chain = matrix.fused if scheme.fused_scale else ""
    return writing.TensorGroup(tuple(outputs), blocks, chain)


def _stack(
    name: str, experts: Sequence[Matrix], scheme: Scheme, rows: FusedRows
) -> writing.TensorGroup:
    """Return the work for a stack of experts, whose codes and scales are stacked, too."""
    width = scheme.tile[1]
    shape = len(experts), experts[0].outputs, experts[0].inputs // width
    outputs = (
        writing.OutputTensor(f"{name}_blocks", scheme.codes, (*shape, width // 2)),
        writing.OutputTensor(f"{name}_scales", scheme.scales, shape),
    )

    def blocks() -> Iterator[tuple[str, npt.NDArray[np.generic]]]:
        for matrix in experts:
            yield from rows.rounded(matrix, f"{name}_blocks", f"{name}_scales")

    return writing.TensorGroup(outputs, blocks)


QUANTIZER = Quantizer(
    name="rounded",
    builder="merge",
    formats=tuple(scheme.format for scheme in SCHEMES.values()),
    recipe_number=1,
    check_input=lambda format_, model: checkpoints.check_rounded(SCHEMES[format_.name], model),
    steps=lambda request: running.python_step(
        "weightsmith.worker.quantize_rounded",
        request,
        f"rounding to {request.format.name}",
        method=request.format.name,
    ),
    check=lambda request: checked(
        request,
        PackedLayout.of_scheme(
            stored_as(SCHEMES[request.format.name], read_facts(request.model).architecture)
        ),
        "rounded",
    ),
    peak_disk=lambda size, kept, format_, _options: checkpoints.output_bytes(size, kept, format_),
    options=options,
    check_options=checkpoints.check_kept,
    view=view_of,
    computed=True,
    data_free=True,
    fused_scales=lambda format_: SCHEMES[format_.name].fused_scale,
    streams=True,
)
