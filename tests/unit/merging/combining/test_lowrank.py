"""Truncation and conflicts from factors, against decompositions of whole deltas."""

from __future__ import annotations

import numpy as np
import pytest
from weightsmith.core.errors import CheckFailed
from weightsmith.merging.combining.measure import Conflicts
from weightsmith.merging.combining.methods import (
    LowRankDelta,
    concatenate,
    to_float32,
    truncate,
    truncate_whole,
)


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
    random = np.random.default_rng(1)
    conflicts = Conflicts()
    for name in "xyz":
        made = [
            LowRankDelta(
                left=random.standard_normal((300, 4), np.float32),
                right=random.standard_normal((4, 200), np.float32),
                gain=1.0,
            )
            for _ in range(2)
        ]
        conflicts.add(name, {0: [made[0]], 1: [made[1]]})
    assert conflicts.findings(["a", "b"]) == []


def test_an_untrained_adapter_has_no_norm() -> None:
    (one,) = pairs((3,))
    nothing = LowRankDelta(left=one.left * 0, right=one.right, gain=1.0)
    conflicts = Conflicts()
    conflicts.add("x", {0: [one], 1: [nothing]})
    (entry,) = conflicts.report(["a", "b"])
    assert entry["norm_ratio"] is None
    assert entry["cosine"] == 0.0
