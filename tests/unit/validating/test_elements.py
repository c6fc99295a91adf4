"""The element check against exact rational arithmetic."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from weightsmith.validating.elements import (
    ARITHMETIC,
    Factors,
    TensorComparison,
    compare_bytes,
    compare_rows,
    half_step,
)

TYPES = [torch.bfloat16, torch.float16, torch.float32]


def exact_rounding(value: Fraction, dtype: torch.dtype) -> float:
    """Return the nearest number of a type, found by looking at the neighbours of a guess."""
    guess = torch.tensor(float(value), dtype=torch.float64).to(dtype)
    near = [guess, step(guess, 1), step(guess, -1)]
    return min((float(n) for n in near), key=lambda n: abs(Fraction(n) - value))


def step(value: torch.Tensor, by: int) -> torch.Tensor:
    """Return the neighbour of a positive or negative number, away from zero for +1."""
    kind = torch.int32 if value.dtype == torch.float32 else torch.int16
    return (value.view(kind) + by).view(value.dtype)


@given(seed=st.integers(0, 10**6), dtype=st.sampled_from(TYPES))
@settings(max_examples=20)
def test_exact_roundings_pass_and_neighbours_do_not(seed: int, dtype: torch.dtype) -> None:
    torch.manual_seed(seed)
    left, right = torch.randn(6, 3), torch.randn(3, 5)
    base = torch.randn(6, 5).to(dtype)
    merged, truth = torch.empty(6, 5, dtype=dtype), {}
    for i in range(6):
        for j in range(5):
            products = (
                Fraction(float(a)) * Fraction(float(b))
                for a, b in zip(left[i], right[:, j], strict=True)
            )
            truth[i, j] = Fraction(float(base[i, j])) + sum(products)
            merged[i, j] = exact_rounding(truth[i, j], dtype)
    factors = Factors(left=left, right=right, scalings=torch.ones(3, dtype=torch.float64))

    assert count(base, factors, merged) == 0
    for i, j in ((0, 0), (3, 2), (5, 4)):
        for by in (-1, 1):
            wrong = merged.clone()
            wrong[i, j] = step(merged[i, j], by)
            distance = abs(Fraction(float(wrong[i, j])) - truth[i, j])
            nearer = min(abs(float(wrong[i, j])), abs(float(truth[i, j])))
            half = Fraction(float(half_step(torch.tensor([nearer]), dtype)))
            # Nearly half way both neighbours are as good, as far as the arithmetic can tell.
            start = Fraction(float(base[i, j]))
            slack = Fraction(ARITHMETIC) * (abs(start) + abs(truth[i, j] - start))
            if distance > half + 2 * slack:
                assert count(base, factors, wrong) == 1, (dtype, by, float(distance / half))


def count(base: torch.Tensor, factors: Factors, merged: torch.Tensor) -> int:
    tally = TensorComparison(tensor="x")
    compare_rows(tally, 0, base.float(), factors.rows(0, len(base)), merged, factors)
    assert tally.total == merged.numel()
    return tally.wrong


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", TYPES)
def test_what_is_no_number_is_wrong(bad: float, dtype: torch.dtype) -> None:
    base = torch.randn(4, 4)
    merged = base.to(dtype)
    merged[1, 2] = bad
    tally = TensorComparison(tensor="x")

    compare_rows(tally, 8, base, torch.zeros(4, 4), merged)

    assert (tally.wrong, tally.row, tally.column) == (1, 9, 2)


def test_bits_of_an_untouched_tensor_count_and_not_values() -> None:
    base = torch.zeros(3, 2, dtype=torch.bfloat16)
    merged = base.clone()
    merged[2, 1] = -0.0
    tally = TensorComparison(tensor="x")

    compare_bytes(tally, 0, base, base)
    compare_bytes(tally, 3, base, merged)

    assert (tally.total, tally.wrong, tally.row, tally.column) == (12, 1, 5, 1)
