"""Whole tensors written through bands and matrix views: every bit, against exact fractions."""

from __future__ import annotations

import tempfile
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from weightsmith.merging.blocks import Settings
from weightsmith.merging.outputs import MatrixView, MergedTensor, OutputShard, StoredTensor, Term
from weightsmith.merging.rounding import FORMATS
from weightsmith.merging.shards import MergeCounts, ShardMaker
from weightsmith.merging.stream import ARRAY_TYPES
from weightsmith.models.safetensors import build_header, read_header

from tests.unit.merging.test_kernel import oracle

TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
FLOATS = st.integers(-40, 40).map(lambda n: n / 8)
TYPES = st.sampled_from(["BF16", "F16", "F32"])


def write(path: Path, tensors: dict[str, tuple[str, np.ndarray]]) -> dict[str, StoredTensor]:
    table = [(name, dtype, array.shape) for name, (dtype, array) in tensors.items()]
    data = b"".join(np.ascontiguousarray(array).tobytes() for _, array in tensors.values())
    path.write_bytes(build_header(table, {}) + data)
    return {info.name: StoredTensor(path=path, info=info) for info in read_header(path).tensors}


@st.composite
def arrays(draw: Any, dtype: str, *shape: int) -> np.ndarray:
    count = int(np.prod(shape))
    values = draw(st.lists(FLOATS, min_size=count, max_size=count))
    return np.array(values).reshape(shape).astype(ARRAY_TYPES[dtype])


@st.composite
def cases(draw: Any) -> tuple[Any, ...]:
    """A base, and terms of several kinds: at any rows, cut, turned, blocks on the diagonal."""
    rows, columns = draw(st.integers(1, 6)), draw(st.integers(1, 5))
    base = draw(TYPES)
    tensors = {"w": (base, draw(arrays(base, rows, columns)))}
    terms = []
    for number in range(draw(st.integers(1, 3))):
        first = draw(st.integers(0, rows - 1))
        height = draw(st.integers(1, rows - first))
        rank, kind = draw(st.integers(1, 3)), draw(TYPES)
        layout = draw(st.sampled_from(["straight", "turned", "strided"]))
        shapes = {
            "straight": ((height, rank), (rank, columns)),
            "turned": ((rank, height), (columns, rank)),
            "strided": ((height, 2 * rank), (2 * rank, columns)),
        }[layout]
        for side, shape in zip("ba", shapes, strict=True):
            tensors[f"{side}{number}"] = (kind, draw(arrays(kind, *shape)))
        factor = draw(st.sampled_from([1.0, 0.5, 1 / 3, -0.7, 1e-3]))
        terms.append((first, rank, layout, factor))
    return tensors, terms, draw(TYPES), draw(st.integers(1, 12)), draw(st.integers(1, 3))


def matrix(array: np.ndarray, side: str, rank: int, layout: str) -> np.ndarray:
    if layout == "turned":
        return array.T
    if layout == "strided":
        return array[:, 1::2] if side == "b" else array[rank:]
    return array


def part(stored: StoredTensor, side: str, rank: int, layout: str) -> MatrixView:
    height = stored.shape[0]
    if layout == "turned":
        return MatrixView(stored=stored, height=height).transpose
    if layout == "strided":
        cut = {"columns": slice(1, None, 2)} if side == "b" else {"rows": slice(rank, 2 * rank)}
        return MatrixView(stored=stored, height=height, **cut)
    return MatrixView(stored=stored, height=height)


@pytest.mark.slow
@settings(max_examples=120)
@given(case=cases())
def test_every_bit_of_a_written_tensor(case: tuple[Any, ...]) -> None:
    tensors, terms, out, block, workers = case
    with tempfile.TemporaryDirectory() as folder:
        stored = write(Path(folder) / "in", tensors)
        weight = tensors["w"][1]
        output = MergedTensor(
            name="w",
            dtype=out,
            shape=weight.shape,
            source=stored["w"],
            columns=weight.shape[1],
            terms=tuple(
                Term(
                    adapter=0,
                    left=part(stored[f"b{n}"], "b", rank, layout),
                    right=part(stored[f"a{n}"], "a", rank, layout),
                    scaling=factor,
                    factor=factor,
                    first=first,
                )
                for n, (first, rank, layout, factor) in enumerate(terms)
            ),
            kind="merged",
        )
        settings_ = Settings(device="cpu", workers=workers, block=block, piece=block)
        maker = ShardMaker(settings_, MergeCounts())
        path = Path(folder) / "out"
        maker.write(OutputShard(name="out", outputs=(output,)), path, lambda _: None).finish()
        maker.close()
        (info,) = read_header(path).tensors
        bits = np.frombuffer(path.read_bytes()[info.start :], FORMATS[ARRAY_TYPES[out]].bits)

    assert wanted_bits(tensors, terms, out) == bits.tolist()


def wanted_bits(
    tensors: dict[str, tuple[str, np.ndarray]], terms: list[Any], out: str
) -> list[int]:
    weight = tensors["w"][1]
    total = [[Fraction(float(v)) for v in row] for row in weight]
    touched = [[Fraction(0) for _ in row] for row in weight]
    for number, (first, rank, layout, factor) in enumerate(terms):
        b = matrix(tensors[f"b{number}"][1], "b", rank, layout)
        a = matrix(tensors[f"a{number}"][1], "a", rank, layout)
        for i in range(b.shape[0]):
            for j in range(a.shape[1]):
                added = sum(
                    (Fraction(float(b[i, k])) * Fraction(float(a[k, j])) for k in range(rank)),
                    Fraction(0),
                )
                touched[first + i][j] += Fraction(factor) * added
    found, width = [], FORMATS[ARRAY_TYPES[out]].width
    for i, row in enumerate(total):
        for j, value in enumerate(row):
            exact = value + touched[i][j]
            if exact == 0:
                # A weight that nothing is added to keeps its sign; these have none but +0 and -0.
                kept = float(weight[i, j]) == 0 and np.signbit(weight[i, j])
                found.append(int(kept and touched[i][j] == 0) << (width - 1))
            else:
                found.append(oracle(exact, TORCH[out]) & ((1 << width) - 1))
    return found
