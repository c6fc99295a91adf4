"""Pruning, voting, combined factors and truncation, against PEFT's functions and plain numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.utils import merge_utils
from torch import nn
from weightsmith.core.errors import CheckFailed, UsageError
from weightsmith.merging.combining.combination import Combination
from weightsmith.merging.combining.measure import Conflicts
from weightsmith.merging.combining.methods import (
    Factor,
    LowRankDelta,
    combine,
    combine_factors,
    concatenate,
    drop_at_random,
    keep_largest,
    prune,
    to_float32,
    truncate,
    truncate_whole,
)


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


ADAPTERS = {"one": (4, 6.0, 0.7), "two": (4, 3.0, -0.4), "three": (4, 8.0, 1.1)}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(31, 23, bias=False)


def peft_model(ranks: dict[str, int] | None = None) -> Any:
    torch.manual_seed(3)
    model: Any = None
    for name, (rank, alpha, _) in ADAPTERS.items():
        r = (ranks or {}).get(name, rank)
        config = LoraConfig(r=r, lora_alpha=alpha, target_modules=["proj"])
        if model is None:
            model = get_peft_model(Net(), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            torch.nn.init.normal_(parameter)
    return model


def factors(model: Any) -> list[Factor]:
    layer = model.base_model.model.proj
    return [
        Factor(
            a=layer.lora_A[name].weight.detach().numpy(),
            b=layer.lora_B[name].weight.detach().numpy(),
            weight=weight,
            scaling=layer.scaling[name],
            adapter=name,
        )
        for name, (_, _, weight) in ADAPTERS.items()
    ]


@pytest.mark.parametrize("density", [0.15, 0.5, 1.0])
@pytest.mark.parametrize("method", ["linear", "cat", "ties", "magnitude_prune"])
@pytest.mark.filterwarnings("ignore:The density")
def test_pefts_bits(method: str, density: float) -> None:
    model = peft_model({"two": 7} if method == "cat" else None)
    prunes = method in ("ties", "magnitude_prune")
    combination = Combination(method=method, density=density if prunes else None, space="factors")
    given = factors(model)
    model.add_weighted_adapter(
        list(ADAPTERS),
        [weight for _, _, weight in ADAPTERS.values()],
        "all",
        combination_type=method,
        density=density,
    )
    layer = model.base_model.model.proj
    assert layer.scaling["all"] == 1.0
    a, b = combine_factors(given, combination, "proj")
    assert np.array_equal(a, layer.lora_A["all"].weight.detach().numpy())
    assert np.array_equal(b, layer.lora_B["all"].weight.detach().numpy())


def test_dare_keeps_its_share_and_depends_on_the_seed() -> None:
    model = peft_model()
    given = factors(model)
    made = [
        combine_factors(
            given, Combination(method="dare_linear", density=0.5, seed=s, space="factors"), "proj"
        )
        for s in (1, 1, 2)
    ]
    assert np.array_equal(made[0][0], made[1][0])
    assert not np.array_equal(made[0][0], made[2][0])
    assert np.array_equal(given[0].a, factors(model)[0].a)  # the inputs are left alone


def pairs(ranks: tuple[int, ...], shape: tuple[int, int] = (40, 30)) -> list[LowRankDelta]:
    random = np.random.default_rng(5)
    return [
        LowRankDelta(
            left=random.standard_normal((shape[0], rank), np.float32),
            right=random.standard_normal((rank, shape[1]), np.float32),
            gain=0.3 * (-1) ** rank + 0.1 * number,
        )
        for number, rank in enumerate(ranks)
    ]


def whole(parts: list[LowRankDelta]) -> np.ndarray:
    return sum(p.gain * (p.left.astype(float) @ p.right.astype(float)) for p in parts)  # type: ignore[return-value]


def best(delta: np.ndarray, rank: int) -> np.ndarray:
    u, s, vh = np.linalg.svd(delta, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def test_concatenation_is_the_sum() -> None:
    parts = pairs((3, 5, 2))
    left, right = concatenate(parts)
    assert left.shape == (40, 10)
    assert np.allclose(left @ right, whole(parts), atol=1e-13)


@pytest.mark.parametrize("ranks", [(4, 4), (3, 9), (25, 20)])  # the last exceed the columns
@pytest.mark.parametrize("rank", [1, 4, 12, 100])
def test_truncation_is_the_best_of_its_rank(ranks: tuple[int, ...], rank: int) -> None:
    parts = pairs(ranks)
    left, right = truncate(parts, rank)
    assert left.shape[1] == right.shape[0] <= rank
    assert np.allclose(left @ right, best(whole(parts), rank), atol=1e-12)


@pytest.mark.parametrize("shape", [(40, 30), (30, 40)])
def test_truncation_of_a_whole_delta(shape: tuple[int, int]) -> None:
    delta = np.random.default_rng(2).standard_normal(shape, np.float32)
    left, right = truncate_whole(delta, 6)
    assert np.allclose(left @ right, best(delta.astype(float), 6), atol=1e-7)


def test_factors_in_float32_keep_the_product() -> None:
    left, right = truncate(pairs((4, 4)), 8)
    single = to_float32((left * 1e30, right * 1e-30), "x")
    assert all(side.dtype == np.float32 for side in single)
    product = single[0].astype(float) @ single[1].astype(float)
    assert np.allclose(product, left @ right, atol=1e-5)
    assert np.isfinite(to_float32((left * 0, right), "x")[0]).all()
    with pytest.raises(CheckFailed, match="not finite"):
        to_float32((left * 1e40, right * 1e40), "x")


def test_conflicts_are_those_of_the_whole_deltas() -> None:
    one, two = pairs((3,))[0], pairs((3, 5))[1]
    against = LowRankDelta(left=-one.left, right=one.right, gain=one.gain * 2)
    conflicts = Conflicts()
    conflicts.add("x", {0: [one], 1: [two], 2: [against]})
    conflicts.add("y", {0: [one], 2: [one]})
    report = {tuple(entry["adapters"]): entry for entry in conflicts.report(["a", "b", "c"])}
    a, b = whole([one]), whole([two])
    wanted = float((a * b).sum() / (np.linalg.norm(a) * np.linalg.norm(b)))
    assert report["a", "b"]["cosine"] == pytest.approx(wanted, abs=1e-4)
    assert report["a", "b"]["norm_ratio"] == pytest.approx(
        max(np.linalg.norm(a), np.linalg.norm(b)) / min(np.linalg.norm(a), np.linalg.norm(b)),
        rel=1e-3,
    )
    assert report["a", "c"]["cosine_per_tensor"] == {"x": -1.0, "y": 1.0}
    assert report["a", "c"]["opposing_signs"] == pytest.approx(0.5)
    (warning, *_) = [f for f in conflicts.findings(["a", "b", "c"]) if f.startswith("a and c")]
    assert "x (-1.00)" in warning
    assert "50%" in warning


def test_unrelated_adapters_are_no_conflict() -> None:
    one, two = pairs((4, 4), (300, 200))
    conflicts = Conflicts()
    conflicts.add("x", {0: [one], 1: [two]})
    assert conflicts.findings(["a", "b"]) == []


def test_an_untrained_adapter_has_no_norm() -> None:
    (one,) = pairs((3,))
    nothing = LowRankDelta(left=one.left * 0, right=one.right, gain=1.0)
    conflicts = Conflicts()
    conflicts.add("x", {0: [one], 1: [nothing]})
    (entry,) = conflicts.report(["a", "b"])
    assert entry["norm_ratio"] is None
    assert entry["cosine"] == 0.0
