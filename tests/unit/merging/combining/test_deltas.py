"""Pruning and voting on whole deltas, against PEFT's own functions and plain numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils import merge_utils
from weightsmith.core.errors import UsageError
from weightsmith.merging.combining.combination import Combination
from weightsmith.merging.combining.methods import combine, drop_at_random, keep_largest, prune


def deltas(count: int = 3, shape: tuple[int, ...] = (37, 53)) -> list[np.ndarray]:
    random = np.random.default_rng(count)
    return [random.standard_normal(shape, np.float32) for _ in range(count)]


def peft(parts: list[np.ndarray]) -> list[torch.Tensor]:
    return [torch.from_numpy(part.astype(np.float64)) for part in parts]


@pytest.mark.parametrize("density", [0.05, 0.2, 0.5, 0.99, 1.0])
def test_the_largest_are_kept_as_in_peft(density: float) -> None:
    (delta,) = deltas(1)
    wanted = merge_utils.magnitude_based_pruning(torch.from_numpy(delta.copy()), density)
    assert np.array_equal(keep_largest(delta, density), wanted.numpy())


@given(
    values=st.lists(st.integers(-3, 3), min_size=1, max_size=60),
    density=st.floats(0.01, 1.0),
)
@settings(max_examples=100, deadline=None)
def test_equal_magnitudes_are_kept_in_order(values: list[int], density: float) -> None:
    delta = np.array(values, np.float32)
    kept = int(density * len(values))
    order = sorted(range(len(values)), key=lambda i: (-abs(values[i]), i))[:kept]
    wanted = [float(v) if i in order else 0.0 for i, v in enumerate(values)]
    assert keep_largest(delta, density).tolist() == wanted


def test_random_pruning_depends_on_its_names_alone() -> None:
    ones = np.ones((1000, 77), np.float32)
    one = drop_at_random(ones.copy(), 0.3, "0", "a.weight", "adapter")
    again = drop_at_random(ones.copy(), 0.3, "0", "a.weight", "adapter")
    other = drop_at_random(ones.copy(), 0.3, "0", "b.weight", "adapter")
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)
    kept = one != 0
    # Five standard deviations of a binomial distribution.
    assert abs(float(kept.mean()) - 0.3) < 5 * (0.3 * 0.7 / ones.size) ** 0.5
    assert (one[kept] == np.float32(1) / np.float32(0.3)).all()
    # Independent draws: two masks agree as often as chance has it.
    both = float(((one != 0) & (other != 0)).mean())
    assert abs(both - 0.09) < 0.01


def test_random_pruning_is_a_stream_in_row_order() -> None:
    # Also across the chunks that it is drawn in: the start of a long tensor is that of a short one.
    long = drop_at_random(np.ones((1 << 20) + 33, np.float32), 0.5, "x")
    short = drop_at_random(np.ones(2001, np.float32), 0.5, "x")
    assert np.array_equal(long[:2001], short)
    assert 0 < int((long[1 << 20 :] != 0).sum()) < 33


@pytest.mark.parametrize("density", [0.2, 0.7, 1.0])
@pytest.mark.parametrize("method", ["ties", "magnitude_prune"])
@pytest.mark.filterwarnings("ignore:The density")
def test_votes_and_sums_are_pefts(method: str, density: float) -> None:
    parts, weights = deltas(3), [0.7, -0.4, 1.3]
    function = getattr(merge_utils, method)
    wanted = function(peft(parts), torch.tensor(weights, dtype=torch.float64), density)
    combination = Combination(method=method, density=density)
    prune(parts, combination, "x", ["a", "b", "c"])
    assert np.allclose(combine(parts, weights, combination), wanted.numpy(), rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_is_pefts_with_our_masks(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parts, weights = deltas(2), [0.7, 0.4]
    combination = Combination(method=method, density=0.4, seed=9)
    masked = [drop_at_random(p.copy(), 0.4, "9", "x", n) for p, n in zip(parts, "ab", strict=True)]
    given = iter(peft(masked))
    monkeypatch.setattr(merge_utils, "prune", lambda *_, **__: next(given))
    wanted = getattr(merge_utils, method)(masked, torch.tensor(weights, dtype=torch.float64), 0.4)
    prune(parts, combination, "x", ["a", "b"])
    assert np.allclose(combine(parts, weights, combination), wanted.numpy(), rtol=1e-14, atol=1e-15)


def test_a_vote_without_majority_is_plus() -> None:
    one = np.array([[2.0, -3.0, 0.0]], np.float32)
    combination = Combination(method="ties", density=1.0)
    assert combine([one, -one], [1.0, 0.5], combination).tolist() == [[2.0, 1.5, 0.0]]


def test_rows_can_be_combined_apart() -> None:
    combination = Combination(method="ties", density=0.3)
    parts = deltas(3)
    prune(parts, combination, "x", ["a", "b", "c"])
    whole = combine(parts, [1.0, 1.0, 1.0], combination)
    some = combine([part[5:9] for part in parts], [1.0, 1.0, 1.0], combination)
    assert np.array_equal(some, whole[5:9])


def test_thresholds_of_tiny_and_negative_values() -> None:
    delta = np.array([1e-45, -2e-40, 0.0, -0.0, -3.0, 2.0], np.float32)
    assert np.array_equal(keep_largest(delta, 0.5) != 0, [0, 1, 0, 0, 1, 1])


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"method": "ties"}, "needs a density"),
        ({"method": "ties", "density": 0.0}, "density 0"),
        ({"method": "ties", "density": 1.5}, "density 1.5"),
        ({"method": "linear", "density": 0.5}, "density 0.5 for method linear"),
        ({"method": "linear", "rank": 4}, "rank 4"),
        ({"method": "svd", "rank": 0}, "rank 0"),
        ({"method": "ties", "density": 0.5, "seed": 1}, "seed 1"),
        ({"method": "dare_ties", "density": 0.5, "seed": -1}, "seed -1"),
        ({"space": "factors"}, "sequential does not work on factors"),
    ],
)
def test_what_does_not_go_together_is_refused(options: dict[str, object], what: str) -> None:
    with pytest.raises(UsageError, match=what) as caught:
        Combination(**options)  # type: ignore[arg-type]
    assert caught.value.hint
