"""Answers by a GPU beside the CPU's, printed as one table."""
# ruff: noqa: T201 - the table is for whoever runs this

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from weightsmith.forward.greedy import Answers, Questions, greedy
from weightsmith.forward.lockstep import Lockstep
from weightsmith.forward.products import DeviceCopier, on_gpu
from weightsmith.forward.views import view

from tests.unit.validating.conftest import make_adapter, make_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]
SIZES = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8}
PROMPTS = [[1, *range(40, 99), extra] for extra in range(100, 133)]
TIE = 1e-3
"""Difference of two logits below which rounding may decide."""


def answers(
    root: Path, lora: Path, products: DeviceCopier | None
) -> tuple[dict[str, Answers], float]:
    lockstep = Lockstep(products=products)
    given = (("base", []), ("adapter", [(lora, 1.0)]))
    views = {name: view(root, adapters, lockstep, 0) for name, adapters in given}
    asked = Questions(prompts=PROMPTS, ends=[2], most=32)
    started = time.perf_counter()
    found = lockstep.run(
        {n: lambda m=m: greedy(m, asked, lambda _: None) for n, m in views.items()}
    )
    return found, time.perf_counter() - started


def test_answers_are_those_of_the_cpu_but_for_near_ties(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", **SIZES)
    lora = make_adapter(tmp_path / "lora", base)

    cpu, cpu_seconds = answers(base, lora, None)
    answers(base, lora, on_gpu())  # the first call loads CUDA's kernels
    gpu, gpu_seconds = answers(base, lora, on_gpu())

    print(f"\n| {torch.cuda.get_device_name()} | equal answers | largest margin of another |")
    print("|---|---|---|")
    for name in cpu:
        rows = zip(cpu[name].tokens, gpu[name].tokens, cpu[name].margins, strict=True)
        ties = [tie(a, b, margins) for a, b, margins in rows if a != b]
        same = len(PROMPTS) - len(ties)
        print(f"| {name} | {same} of {len(PROMPTS)} | {max(ties, default=0):.2g} |")
        assert max(ties, default=0) < TIE
    print(f"CPU {cpu_seconds:.1f} s, GPU {gpu_seconds:.1f} s")


def tie(mine: list[int], other: list[int], margins: list[float]) -> float:
    """Return by how much the CPU preferred its token where the answers part."""
    return next(m for a, b, m in zip(mine, other, margins, strict=False) if a != b)


@pytest.mark.parametrize("rows", [1, 33, 1000])
def test_products_are_in_full_float32(rows: int) -> None:
    matrix, inputs = torch.randn(9000, 1024).bfloat16(), torch.randn(rows, 1024)
    exact = inputs.double() @ matrix.double().T
    products = on_gpu()
    assert products is not None

    error = (products.multiply(inputs, matrix) - exact).abs().max()

    assert error < 3 * (inputs @ matrix.float().T - exact).abs().max() + 1e-5
