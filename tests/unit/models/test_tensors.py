"""Parts of tensors: the same numbers as numpy's, and no row is read or computed twice in a row."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import save_file as torch_save
from weightsmith.models.safetensors import NO_DATA, build_header, open_checkpoint
from weightsmith.models.tensors import CheckpointTensors, array_type, filled, largest

VALUES = np.random.default_rng(0).standard_normal((3, 4, 6)).astype(np.float32)
ALL = slice(None)
PARTS = [
    (1, ALL, slice(0, 2)), (1, ALL, slice(2, 6)), (2, ALL, slice(0, 2)),
    (0, slice(1, 3), slice(1, 2)), (0, slice(1, 3)), (slice(1, 3),), (2,), (),
]  # fmt: skip


def test_parts_are_those_of_numpy(tmp_path):
    save_file({"a": VALUES, "b": -VALUES}, tmp_path / "model.safetensors")
    tensors = CheckpointTensors(tmp_path)

    for part in PARTS:
        for name, whole in (("a", VALUES), ("b", -VALUES)):
            np.testing.assert_array_equal(tensors.part(name, part), whole[part])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_scalar_is_an_array(tmp_path, dtype):
    """Apertus has some in each layer."""
    torch_save({"a": torch.tensor(1.5, dtype=dtype)}, tmp_path / "model.safetensors")
    tensors = CheckpointTensors(tmp_path)

    for found in (tensors.f32("a"), tensors.part("a", ())):
        assert isinstance(found, np.ndarray)
        assert found.shape == ()
        assert found == 1.5


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
@pytest.mark.parametrize("signs", [(1, -1), (1,), (-1,)], ids=["both signs", "plus", "minus"])
def test_the_largest_magnitude_is_that_of_plain_arithmetic(dtype, signs):
    random = np.random.default_rng(1)
    for size in (1, 2, 1000):
        values = np.abs(random.standard_normal(size)) * random.choice(signs, size)
        values[0] *= random.choice([0, 1, 100])
        stored = values.astype(array_type(dtype))

        found = largest(stored)

        assert found == max(abs(float(value)) for value in stored)
        assert str(found)[0] != "-"


def test_nan_is_larger_than_all():
    for nan in (np.nan, -np.nan):
        assert np.isnan(largest(np.array([1, nan, -np.inf], np.float32)))


class Counting:
    """Computes a file of one tensor, and remembers what was read."""

    def __init__(self, start: int) -> None:
        self.start, self.read_bytes = start, 0

    def read(self, start: int, size: int) -> np.ndarray:
        self.read_bytes += size
        at = start - self.start
        return np.frombuffer(VALUES.tobytes(), np.uint8)[at : at + size]


@pytest.mark.parametrize("columns", [1, 2, 6])
def test_rows_are_computed_once_for_all_their_columns(tmp_path, columns):
    file = tmp_path / "model.safetensors"
    file.write_bytes(build_header([("a", "F32", VALUES.shape)], NO_DATA))
    (header,) = open_checkpoint(tmp_path).shards
    data = Counting(header.tensors[0].start)
    with filled({file: data}):
        tensors = CheckpointTensors(tmp_path)
        for expert in range(3):
            for first in range(0, 6, columns):
                part = (expert, slice(None), slice(first, first + columns))
                np.testing.assert_array_equal(tensors.part("a", part), VALUES[part])
    assert data.read_bytes == VALUES.nbytes
