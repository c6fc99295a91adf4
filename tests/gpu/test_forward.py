"""Answers by a GPU beside the CPU's."""
# ruff: noqa: T201 - the figures are for whoever runs this

from __future__ import annotations

import pytest
import torch
from weightsmith.forward.products import on_gpu

from tests.gpu.numbers import forward

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]
TIE = 1e-3
"""Difference of two logits below which rounding may decide."""


def test_answers_are_those_of_the_cpu_but_for_near_ties() -> None:
    found = forward()

    print(f"\n{torch.cuda.get_device_name()}: {found}")
    assert found["largest_margin"] < TIE


@pytest.mark.parametrize("rows", [1, 33, 1000])
def test_products_are_in_full_float32(rows: int) -> None:
    matrix, inputs = torch.randn(9000, 1024).bfloat16(), torch.randn(rows, 1024)
    exact = inputs.double() @ matrix.double().T
    products = on_gpu()
    assert products is not None

    error = (products.multiply(inputs, matrix) - exact).abs().max()

    assert error < 3 * (inputs @ matrix.float().T - exact).abs().max() + 1e-5
