"""The kernel against Fraction arithmetic: every bit, on shapes and numbers chosen to be hard."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from threadpoolctl import threadpool_limits
from weightsmith.core.errors import InputRefused
from weightsmith.merging import kernel, torch_kernel
from weightsmith.merging.kernel import PreparedAddition, Space, finish_rows, merge_rows, prepare
from weightsmith.merging.repair import LowRankUpdate
from weightsmith.merging.rounding import BF16, F16, F32, FORMATS, round_dyadic, round_once
from weightsmith.merging.torch_kernel import as_tensor

ARRAYS = {torch.bfloat16: BF16, torch.float16: F16, torch.float32: F32}
INTEGERS = {2: torch.int16, 4: torch.int32}
DTYPES = list(ARRAYS)


def as_array(tensor: torch.Tensor) -> np.ndarray:
    """The tensor's own bits as a numpy array."""
    bits = tensor.contiguous().view(INTEGERS[tensor.itemsize]).numpy()
    return bits.view(ARRAYS[tensor.dtype])


def oracle(value: Fraction, dtype: torch.dtype) -> int:
    """Bits of the nearest float, ties to even: by comparing distances, as the definition says.

    Candidates are the nearest by torch's own rounding, and those beside it.
    """
    start = torch.tensor(float(value), dtype=torch.float64).to(dtype)
    bits = start.view(INTEGERS[dtype.itemsize])
    near = (bits.long() + torch.arange(-3, 4)).to(bits.dtype)
    options = [
        (abs(Fraction(f) - value), b & 1, b)
        for f, b in zip(near.view(dtype).double().tolist(), near.tolist(), strict=True)
        if abs(f) != float("inf") and f == f and (f != 0 or (b < 0) == (value < 0))
    ]
    return min(options)[2]


def expected_bits(
    weight: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    gains: Sequence[float],
    dtype: torch.dtype,
) -> list[int]:
    w, b, a = weight.double().tolist(), left.double().tolist(), right.double().tolist()
    found = []
    for i, row in enumerate(w):
        for j, value in enumerate(row):
            products = (
                Fraction(b[i][k]) * Fraction(a[k][j]) * Fraction(g) for k, g in enumerate(gains)
            )
            delta = sum(products, Fraction(0))
            exact = Fraction(value) + delta
            if delta == 0:
                # Nothing added: the weight itself, its sign included.
                kept = weight[i, j].reshape(1).to(dtype)
                found.append(int(kept.view(INTEGERS[dtype.itemsize])))
            else:
                found.append(oracle(exact, dtype) if exact else 0)
    return found


def on_cpu(prepared: PreparedAddition, weight: np.ndarray, first: int, out: np.ndarray) -> None:
    # Pieces of two rows, so that blocks have several.
    space = Space(2 * weight.shape[1], prepared.dtype, prepared.work)
    merge_rows(prepared, weight, first, space, out)


def on_device(prepared: PreparedAddition, weight: np.ndarray, first: int, out: np.ndarray) -> None:
    """As on a GPU: torch's first pass, the same end."""
    held = torch_kernel.to_device(prepared, "cuda" if torch.cuda.is_available() else "cpu")
    flagged, safe = torch_kernel.first_pass(held, weight, first, out)
    finish_rows(prepared, weight, first, out, flagged, safe)


def merged(
    weight: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    gains: Sequence[float],
    dtype: torch.dtype,
    rows: int = 1 << 20,
    way: Any = on_cpu,
) -> torch.Tensor:
    factors = LowRankUpdate(
        left=as_array(left.float()), right=as_array(right.float()), gains=np.array(gains)
    )
    prepared = prepare("w", factors, ARRAYS[dtype])
    out = np.empty(weight.shape, ARRAYS[dtype])
    for first in range(0, len(weight), rows):
        part = slice(first, first + rows)
        way(prepared, as_array(weight)[part], first, out[part])
    return as_tensor(out)


def check(*case: Any, rows: int = 1 << 20) -> None:
    weight, left, right, gains, dtype = case
    expected = expected_bits(weight, left, right, gains, dtype)
    for way in (on_cpu, on_device):
        got = merged(weight, left, right, gains, dtype, rows, way).flatten()
        assert expected == got.view(INTEGERS[dtype.itemsize]).tolist()


KINDS = ("gaussian", "integers", "cancelling", "tiny", "spread", "sparse")


def make_case(
    seed: int, kind: str, shape: tuple[int, int, int], base: torch.dtype, out: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[float], torch.dtype]:
    """Random factors of one kind; `shape` is rows, rank, columns."""
    rows, rank, columns = shape
    random = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=random)

    weight, left, right = normal(rows, columns), normal(rows, rank), normal(rank, columns)
    gains = [[1.0, 0.5, 0.3, 2.0, -0.7][seed % 5]] * rank
    match kind:
        case "integers":
            # Sums of small integers land on ties again and again.
            weight = torch.randint(-300, 300, weight.shape, generator=random).float()
            left = torch.randint(-3, 4, left.shape, generator=random).float()
            right = torch.randint(-3, 4, right.shape, generator=random).float() / 2
        case "cancelling":
            left, right = left.bfloat16().float(), right.bfloat16().float()
            weight = -(left.double() @ right.double() * gains[0]).float()
        case "tiny":
            scale = 2.0**-24 if out == torch.float16 else 2.0**-131
            weight, left, right = weight * scale, left * scale, right * 3
        case "spread":
            weight = weight * torch.exp2(torch.randint(-20, 5, weight.shape, generator=random))
            left = left * torch.exp2(torch.randint(-20, 5, left.shape, generator=random))
        case "sparse":
            weight[:, ::2] = -0.0
            right[:, ::3] = 0.0
            left[::2] = 0.0
        case _:
            weight, left = weight / 32, left / 64
    if out == torch.float16:
        weight = weight.clamp(-1000, 1000)
    return weight.to(base), left, right, gains, out


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    kind=st.sampled_from(KINDS),
    shape=st.tuples(st.integers(1, 6), st.integers(1, 9), st.integers(1, 7)),
    base=st.sampled_from(DTYPES),
    out=st.sampled_from(DTYPES),
    rows=st.integers(1, 6),
    adapter=st.sampled_from(DTYPES),
)
@example(1, "integers", (6, 4, 7), torch.bfloat16, torch.bfloat16, 2, torch.float32)
def test_every_bit_is_the_correctly_rounded_sum(
    seed: int,
    kind: str,
    shape: tuple[int, int, int],
    base: torch.dtype,
    out: torch.dtype,
    rows: int,
    adapter: torch.dtype,
) -> None:
    weight, left, right, gains, _ = make_case(seed, kind, shape, base, out)
    left, right = left.to(adapter), right.to(adapter)
    if seed % 2:  # two adapters are one sum, rounded once
        gains = [*gains[1:], -1 / 3]

    check(weight, left, right, gains, out, rows=rows)


@pytest.mark.grid(4)
@pytest.mark.parametrize("out", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_larger_blocks(kind: str, out: torch.dtype) -> None:
    base = torch.bfloat16 if out == torch.float32 else out

    check(*make_case(7, kind, (12, 16, 36), base, out))


@pytest.mark.parametrize("out", DTYPES)
def test_bytes_do_not_depend_on_threads_or_blocks(out: torch.dtype) -> None:
    weight, left, right, gains, _ = make_case(5, "gaussian", (150, 64, 500), out, out)
    results = []
    for count, rows in ((1, 150), (2, 150), (1, 1), (2, 7), (1, 64)):
        with threadpool_limits(limits=count):
            for way in (on_cpu, on_device):
                got = merged(weight, left, right, gains, out, rows, way)
                results.append(got.view(INTEGERS[out.itemsize]))

    assert all(torch.equal(results[0], other) for other in results)


def ties() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[float], torch.dtype]:
    """Sums 2**-30 beside a midpoint of bfloat16, where float32 sees the midpoint itself."""
    rows, columns = 8, 16
    weight = torch.ones(rows, columns).bfloat16()
    side = torch.ones(rows, 1)
    side[::2] = -1.0
    left = torch.cat([torch.full((rows, 1), 2.0**-8), side * 2.0**-30], 1)
    return weight, left, torch.ones(2, columns), [1.0, 1.0], torch.bfloat16


def test_near_ties_are_decided_by_the_exact_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound is what makes the kernel exact: leave it out and the ties go wrong."""
    check(*ties())
    monkeypatch.setattr(kernel, "_bound", lambda left, *_: np.zeros_like(left))
    monkeypatch.setattr(kernel, "SLACK", 0)

    with pytest.raises(AssertionError):
        check(*ties())


@pytest.mark.parametrize("out", [torch.bfloat16, torch.float16])
def test_rounding_float64_once(out: torch.dtype) -> None:
    """A conversion through float32 rounds twice; this value shows the difference."""
    form = FORMATS[ARRAYS[out]]
    tie, step = 1 + 2.0**-form.precision, 2.0 ** (1 - form.precision)
    beside = np.array([tie + 2.0**-40, -tie - 2.0**-40, tie - 2.0**-40, tie])

    assert round_once(beside, form.dtype).tolist() == [1 + step, -1 - step, 1.0, 1.0]


@settings(max_examples=300, deadline=None)
@given(
    numerator=st.integers(-(1 << 70), 1 << 70).filter(bool),
    exponent=st.integers(-200, 40),
    out=st.sampled_from(DTYPES),
)
def test_rounding_exact_numbers(numerator: int, exponent: int, out: torch.dtype) -> None:
    form = FORMATS[ARRAYS[out]]
    value = Fraction(numerator) * Fraction(2) ** exponent
    bits = round_dyadic(numerator, exponent, form)
    signed = bits - (1 << form.width) if bits >> (form.width - 1) else bits
    if abs(value) < Fraction(form.largest):
        assert oracle(value, out) == signed
    elif abs(value) > Fraction(form.largest) * 2:
        infinity = torch.tensor(signed, dtype=INTEGERS[out.itemsize]).view(out)
        assert abs(float(infinity)) == float("inf")


def test_overflow_is_refused_by_name() -> None:
    factors = LowRankUpdate(
        left=np.array([[60000.0]], F32), right=np.ones((1, 1), F32), gains=np.ones(1)
    )
    prepared = prepare("model.up.weight", factors, F16)
    weight = np.array([[60000.0]], F16)

    with pytest.raises(InputRefused, match=r"model\.up\.weight overflows float16"):
        on_cpu(prepared, weight, 0, np.empty_like(weight))


def test_the_largest_float16_is_not_an_overflow() -> None:
    weight, left = torch.tensor([[65504.0, 65504.0]]).half(), torch.tensor([[1.0]])

    out = merged(weight, left, torch.tensor([[15.99, -70000.0]]), [1.0], torch.float16)

    assert out.tolist() == [[65504.0, -4496.0]]


def test_factors_whose_partial_sums_overflow_are_still_exact() -> None:
    left = torch.tensor([[2.0**120, -(2.0**120), 1.0]])
    right = torch.tensor([[2.0**10], [2.0**10], [3.0]])

    check(torch.tensor([[1.0]]).bfloat16(), left, right, [1.0] * 3, torch.bfloat16)


@pytest.mark.parametrize(
    ("weight", "out"),
    [
        (torch.tensor([[float("nan"), 1.0]]).bfloat16(), torch.bfloat16),
        # Infinite halves do not pass for large numbers.
        (torch.tensor([[float("inf"), 1.0]]).half(), torch.bfloat16),
        (torch.tensor([[float("inf"), 1.0]]).half(), torch.float32),
    ],
)
def test_not_finite_weights_are_refused_by_name(weight: torch.Tensor, out: torch.dtype) -> None:
    with pytest.raises(InputRefused, match="the base's w has NaN or infinite"):
        merged(weight, torch.ones(1, 1), torch.full((1, 2), -5000.0), [1.0], out)
