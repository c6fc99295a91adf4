"""The library merges to the bits of numpy's passes, with every width of vectors of this CPU."""

import numpy as np
import pytest
import torch
from weightsmith.core.errors import EnvironmentFailure, InputRefused
from weightsmith.core.kernels import library
from weightsmith.merging import kernel, native, proof
from weightsmith.merging.repair import LowRankUpdate
from weightsmith.merging.rounding import BF16, F16, F32
from weightsmith.outside.toolset import tools_variable

from tests.unit.merging.oracle import run

pytestmark = [pytest.mark.builders, pytest.mark.usefixtures("compiled_kernels")]

TYPES = [(BF16, BF16), (F16, F16), (F32, BF16), (F32, F16), (BF16, F16), (F16, BF16)]


def factors(random: np.random.Generator, rows: int, depth: int, columns: int) -> LowRankUpdate:
    left = random.standard_normal((rows, depth), np.float32) * np.float32(0.02)
    left[rows // 2] = 0
    right = random.standard_normal((depth, columns), np.float32) * np.float32(0.02)
    return LowRankUpdate(left=left, right=right, gains=random.choice([0.5, 0.7, -1 / 3], depth))


def weights(random: np.random.Generator, rows: int, columns: int, dtype: np.dtype) -> np.ndarray:
    """Of all sizes: usual ones, tiny, subnormal, zeros of both signs, and integers."""
    usual = random.standard_normal((rows, columns))
    sizes = random.choice(
        [1.0, 1e-3, 1e-7, 1e-39, 0.0], (rows, columns), p=[0.6, 0.1, 0.1, 0.1, 0.1]
    )
    usual[::5] = np.round(usual[::5] * 4)
    return (usual * sizes).astype(dtype)


def merged(made: kernel.PreparedAddition, weight: np.ndarray, first: int) -> np.ndarray:
    out = np.empty(weight.shape, made.dtype)
    kernel.merge_rows(made, weight, first, kernel.Space(1 << 14, made.dtype, F32), out)
    return out.view(np.uint16)


@pytest.mark.parametrize(("base", "out"), TYPES, ids=str)
@pytest.mark.parametrize("shape", [(41, 7, 300), (3, 64, 33), (8, 1, 32), (1, 130, 1), (9, 16, 64)])
def test_bits_are_those_of_numpy(base, out, shape, lanes, monkeypatch):
    random = np.random.default_rng(sum(shape))
    rows, depth, columns = shape
    made = kernel.prepare("tensor", factors(random, rows + 2, depth, columns), out)
    weight = weights(random, rows, columns, base)
    assert native.rounds(base, out)
    found = merged(made, weight, 2)

    monkeypatch.setattr(library, "found", lambda: None)
    assert not native.rounds(base, out)
    assert np.array_equal(found, merged(made, weight, 2))


def test_most_elements_are_decided_at_once(lanes):
    """Else everything would be right, and slow."""
    random = np.random.default_rng(1)
    made = kernel.prepare("tensor", factors(random, 64, 64, 512), BF16)
    weight = random.standard_normal((64, 512)).astype(BF16)
    out = np.empty(weight.shape, BF16)
    undecided, safe = native.round_sums(made.left, made.panels, made.bound, weight, out)
    assert safe
    assert len(undecided) < weight.size / 100


@pytest.mark.parametrize(
    ("wrong", "base", "out", "said"),
    [
        *(
            (value, BF16, BF16, "the base's tensor has NaN or infinite")
            for value in (np.inf, -np.inf, np.nan)
        ),
        (1e5, F32, F16, "overflows float16"),
    ],
)
def test_a_base_that_is_not_finite_and_a_sum_that_overflows_are_refused(
    wrong, base, out, said, lanes
):
    random = np.random.default_rng(2)
    made = kernel.prepare("tensor", factors(random, 8, 4, 40), out)
    weight = random.standard_normal((8, 40)).astype(base)
    weight[5, 39] = wrong
    with pytest.raises(InputRefused, match=said):
        merged(made, weight, 0)


@pytest.mark.parametrize("order", "CF")
def test_products_for_repairs(order, lanes):
    random = np.random.default_rng(4)
    some = factors(random, 30, 37, 50)
    rows, columns = random.integers(0, 30, 400), random.integers(0, 50, 400)
    left, right = np.asarray(some.left, order=order), np.asarray(some.columns, order=order)
    gains = some.gains if order == "C" else np.repeat(some.gains, 2)[::2]
    found = native.dot_products(left, right, gains, rows, columns)
    exact = ((some.left * some.gains) @ some.right.astype(np.float64))[rows, columns]
    assert np.allclose(found, exact, rtol=0, atol=1e-15)


@pytest.mark.parametrize("orders", ["CC", "CF", "FC"])
@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
def test_projections_for_the_proof(dtype, orders, lanes, monkeypatch):
    random = np.random.default_rng(5)
    weights = random.standard_normal((7, 301)).astype(dtype)
    signs = random.integers(0, 2, (2, 301)).astype(F32) * 2 - 1
    given = (np.asarray(a, order=o) for a, o in zip((weights, signs), orders, strict=True))
    ours = proof.project(*given)
    monkeypatch.setattr(library, "found", lambda: None)
    for one, other in zip(ours, proof.project(weights, signs), strict=True):
        assert one.shape == other.shape
        assert np.allclose(one, other, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("count", [0, 1, 15, 16, 1000])
def test_sums_of_words_for_checksums(count, lanes):
    words, factors = np.random.default_rng(9).integers(0, 2**64, (2, count), np.uint64)
    exact = sum(int(a) * int(b) for a, b in zip(words, factors, strict=True)) % 2**64
    assert native.sum_words(words, factors) == exact


def test_factors_and_weights_in_fortran_order_merge_to_the_same_bits(lanes):
    """Parts of transposed layers are views, and numpy keeps their order when it joins them."""
    random = np.random.default_rng(6)
    plain = factors(random, 9, 16, 64)
    turned = LowRankUpdate(
        left=np.asfortranarray(plain.left),
        right=np.asfortranarray(plain.right),
        gains=plain.gains,
    )
    weight = weights(random, 9, 64, BF16)
    expected = merged(kernel.prepare("tensor", plain, BF16), weight, 0)
    found = merged(kernel.prepare("tensor", turned, BF16), np.asfortranarray(weight), 0)
    assert np.array_equal(found, expected)


def test_two_adapters_on_transposed_layers(make_model, make_adapter, tmp_path, monkeypatch):
    """GPT-2 stores (in, out), so factors are transposed, and joined for two adapters."""
    base = make_model("gpt2", dtype=torch.bfloat16)
    adapters = tuple(
        (make_adapter(base, name, seed, fan_in_fan_out=True), 0.7)
        for name, seed in (("one", 1), ("two", 2))
    )

    ours = run(base, adapters, tmp_path / "ours")
    monkeypatch.setattr(library, "found", lambda: None)
    assert ours["shards"] == run(base, adapters, tmp_path / "numpy")["shards"]


def test_without_a_library_that_loads_numpy_merges(tmp_path, monkeypatch):
    (tmp_path / "libkernels.so").write_bytes(b"of another machine")
    monkeypatch.setenv(tools_variable("kernels"), str(tmp_path))
    monkeypatch.setattr(library, "kernels", library.kernels.__wrapped__)
    assert library.found() is None
    assert not native.rounds(BF16, BF16)
    with pytest.raises(EnvironmentFailure, match="cannot be loaded"):
        library.kernels()


def test_float32_results_stay_with_numpy():
    assert not native.rounds(F32, F32)
