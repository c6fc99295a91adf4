"""Intervals over texts: whole texts are drawn again, because their tokens go together."""

import math

import numpy as np
import pytest
import torch
from weightsmith.quantizers.quality.measure import Totals


def logs(rows):
    return torch.log_softmax(torch.tensor(rows), -1)


def totals(shifts, length=25, seed=0):
    """Texts of equal length; the other model's first logit is shifted by so much in each."""
    chance, found = np.random.default_rng(seed), Totals()
    for number, shift in enumerate(shifts):
        rows = chance.normal(size=(length, 5)).astype(np.float32)
        other = rows + np.float32(shift) * np.eye(1, 5, dtype=np.float32)
        following = torch.tensor(chance.integers(5, size=length))
        found.add(logs(rows), logs(other), following, torch.full((length,), number))
    return found


def test_an_interval_is_that_of_means_of_texts():
    """With texts of one length, against numpy drawing the texts' own means."""
    found = totals([0.0, 0.2, 0.4, 0.8, 1.6, 0.1, 0.3, 0.5])
    result = found.result()
    means = [float(part.mean()) for part in found.divergences]
    chance = np.random.default_rng(1)
    drawn = chance.choice(means, size=(20_000, len(means))).mean(1)

    low, high = result["intervals"]["kl_mean"]
    assert result["kl_mean"] == pytest.approx(np.mean(means), rel=1e-5)
    assert low == pytest.approx(np.quantile(drawn, 0.025), rel=0.1)
    assert high == pytest.approx(np.quantile(drawn, 0.975), rel=0.1)


def test_equal_models_lose_nothing_in_any_resample():
    result = totals([0.0] * 6).result()

    assert result["kl_mean"] == result["kl_p99"] == 0.0
    assert result["intervals"]["top1"] == (1.0, 1.0)
    assert result["intervals"]["perplexity_ratio"] == (1.0, 1.0)


def test_the_intervals_hold_the_values_and_are_always_the_same():
    first, second = totals([0.1, 0.5, 0.9, 0.2, 0.7]), totals([0.1, 0.5, 0.9, 0.2, 0.7])
    result = first.result()

    assert result == second.result()
    for name, (low, high) in result["intervals"].items():
        assert low <= result[name] <= high
        assert math.isfinite(high)


def test_few_texts_have_no_interval():
    assert totals([0.1, 0.5, 0.9]).result()["intervals"] == {}
