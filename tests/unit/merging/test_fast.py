"""`fast`: the bits of PEFT's own addition, from numpy's products and from torch's."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_limits
from weightsmith.merging import fast, torch_kernel
from weightsmith.merging.kernel import Addition, Space
from weightsmith.merging.repair import Factors
from weightsmith.merging.rounding import BF16, F16, F32
from weightsmith.merging.torch_kernel import as_tensor

SHAPES = [(16, 16, 4), (17, 33, 16), (64, 48, 2), (93, 5632, 64), (200, 700, 128), (97, 130, 9)]
TYPES = [BF16, F16, F32]


def peft(weight: np.ndarray, left: np.ndarray, right: np.ndarray, gain: float) -> np.ndarray:
    """PEFT's addition: the whole product, times the scaling, onto the weight in place."""
    out = weight.copy()
    target = as_tensor(out)
    target += (as_tensor(left) @ as_tensor(right)) * gain
    return out


def check(way: str, shape: tuple[int, int, int], dtype: np.dtype, gain: float, rows: int) -> None:
    """Merge in blocks of `rows`, so that the last may have a single one."""
    height, width, rank = shape
    random = np.random.default_rng(height)
    left, right = (
        random.standard_normal(size, F32) * F32.type(0.01)
        for size in ((height, rank), (rank, width))
    )
    weight = (random.standard_normal((height, width), F32) * F32.type(0.02)).astype(dtype)
    left[height // 2], weight[height // 2, ::2] = 0, -0.0
    factors = Factors(left=left, right=right, gains=np.full(rank, gain))
    addition, out = Addition(name="w", factors=factors, dtype=dtype), np.empty_like(weight)
    space = Space(16 * width, dtype, F32)
    for first in range(0, height, rows):
        part = slice(first, first + rows)
        if way == "numpy":
            fast.merge_rows_fast(addition, weight[part], first, space, out[part])
        else:
            torch_kernel.merge_rows_fast(addition, weight[part], first, out[part])
    wanted = peft(weight, left, right, gain)
    assert np.array_equal(wanted.view(np.uint8), out.view(np.uint8)), (way, shape, dtype, gain)


def check_all(way: str) -> None:
    torch.set_num_threads(1)
    with threadpool_limits(1):
        for shape in SHAPES:
            for dtype in TYPES:
                for gain in (0.5, 1 / 3):
                    for rows in (31, shape[0] - 1, 1 << 20):
                        check(way, shape, dtype, gain, rows)


def test_torchs_products_of_blocks_are_those_of_the_whole() -> None:
    check_all("torch")


@pytest.mark.slow
def test_numpys_products_are_torchs_where_both_are_fused() -> None:
    # In a process whose BLAS chooses its own instructions, whatever this one's was told.
    told = {name: value for name, value in os.environ.items() if "OPENBLAS" not in name}
    code = (
        "from tests.unit.merging import test_fast as t\n"
        "fused = t.fast.products_are_fused()\n"
        "print(fused)\n"
        "if fused: t.check_all('numpy')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=told, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    if done.stdout.strip() != "True":
        pytest.skip("this machine's numpy multiplies in another order than torch")


@pytest.mark.parametrize(
    ("fused", "shape", "rank", "torch_"),
    [
        (True, (16, 16), 128, False),
        (True, (16, 15), 8, True),
        (True, (15, 900), 8, True),
        (True, (64, 64), 1, True),
        (True, (64, 64), 129, True),
        (False, (64, 64), 8, True),
    ],
)
def test_torch_is_asked_where_numpy_may_sum_otherwise(
    fused: bool,
    shape: tuple[int, int],
    rank: int,
    torch_: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fast, "products_are_fused", lambda: fused)
    usual = SimpleNamespace(shape=(64, 64), rank=8)
    outputs: Any = [SimpleNamespace(terms=[usual, SimpleNamespace(shape=shape, rank=rank)])]

    assert torch_ == fast.needs_torch(outputs)


def test_without_low_rank_terms_nothing_is_multiplied() -> None:
    outputs: Any = [SimpleNamespace(terms=[])]

    assert not fast.needs_torch(outputs)
