"""Combine whole deltas of one tensor: weighted sum, or mean of those with the elected sign.

A delta is what one adapter at weight 1 changes, which is well defined for all kinds. PEFT combines
A and B separately, which adds cross terms and ignores what is no factor; `--space factors` does the
same for models that were evaluated that way.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from weightsmith.merging.combining.combination import Combination
from weightsmith.merging.combining.pruning import drop_at_random, keep_largest
from weightsmith.merging.rounding import F64


def prune(
    deltas: Sequence[np.ndarray], combination: Combination, name: str, adapters: Sequence[str]
) -> None:
    """Prune each delta in place as the method says.

    `deltas` are float32, contiguous and of the same shape; `name` is the tensor's name, and
    `adapters` has each delta's adapter digest, which with the name and the seed gives its mask.
    """
    if combination.density is None:
        return
    for delta, adapter in zip(deltas, adapters, strict=True):
        if combination.random:
            drop_at_random(delta, combination.density, str(combination.seed), name, adapter)
        else:
            keep_largest(delta, combination.density)


def combine(
    deltas: Sequence[np.ndarray], weights: Sequence[float], combination: Combination
) -> np.ndarray:
    """Return the combination of pruned deltas (or of the same rows of each) in float64.

    `ties` and `dare_ties` elect each weight's sign by the sum of the unweighted deltas (zero
    counts as plus) and return the mean of the weighted deltas with that sign; other methods
    return the weighted sum. As PEFT defines them (`peft.utils.merge_utils`), but in float64.
    """
    parts = [delta.astype(F64) for delta in deltas]
    if combination.rule.endswith("ties"):
        return _elected_mean(parts, weights)
    return sum(
        (part * weight for part, weight in zip(parts[1:], weights[1:], strict=True)),
        start=parts[0] * weights[0],
    )


def _elected_mean(parts: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    sign = np.where(sum(parts[1:], start=parts[0]) >= 0, 1.0, -1.0)
    total, count = np.zeros_like(sign), np.zeros_like(sign)
    for part, weight in zip(parts, weights, strict=True):
        agrees = np.sign(part) == sign
        total += part * agrees * weight
        count += agrees
    mean: np.ndarray = total / np.maximum(count, 1.0)
    return mean
