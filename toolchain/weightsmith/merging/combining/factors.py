"""PEFT's `add_weighted_adapter` on A and B separately, bit for bit, in float32.

This is not a sum of deltas: the product of two summed factors has cross terms. It reproduces
models made with PEFT (`peft.tuners.lora.model`, version 0.21).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from weightsmith.merging.combining.combination import Combination
from weightsmith.merging.combining.pruning import drop_at_random, keep_largest
from weightsmith.merging.rounding import F32


@dataclass(frozen=True, slots=True, kw_only=True)
class Factor:
    """One adapter's A and B for a module, float32 as PEFT loads them."""

    a: np.ndarray
    """(rank, in)."""
    b: np.ndarray
    """(out, rank)."""
    weight: float
    scaling: float
    adapter: str
    """Digest of the adapter."""


def combine_factors(
    factors: Sequence[Factor], combination: Combination, name: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return the combined (A, B) for scaling 1, in float32.

    Two differences from PEFT: DARE's masks are keyed by seed, tensor and adapter instead of drawn
    from the global generator, and among equal magnitudes pruning keeps the first. PEFT always
    combines a single adapter by `linear`; callers must do so, because here a single factor can
    also mean that only one of several adapters changes the module.
    """
    if combination.method == "cat":
        # In this order, (A · weight) · scaling, for the same bits as PEFT.
        scaled = [f.a * F32.type(f.weight) * F32.type(f.scaling) for f in factors]
        return np.concatenate(scaled, 0), np.concatenate([factor.b for factor in factors], 1)
    products = [factor.weight * factor.scaling for factor in factors]
    roots = [math.sqrt(abs(product)) for product in products]
    signed = [math.copysign(root, p) for root, p in zip(roots, products, strict=True)]
    sides = []
    for side, weights in (("a", signed), ("b", roots)):
        tensors = np.stack([getattr(factor, side) for factor in factors])
        for tensor, factor in zip(tensors, factors, strict=True):
            _prune(tensor, combination, name, f"{side} {factor.adapter}")
        sides.append(_merged(tensors, np.array(weights, F32), combination))
    return sides[0], sides[1]


def _prune(tensor: np.ndarray, combination: Combination, name: str, adapter: str) -> None:
    density = combination.density or 1.0
    if density < 1 and combination.random:
        drop_at_random(tensor, density, str(combination.seed), name, adapter)
    elif density < 1:
        keep_largest(tensor, density)


def _merged(tensors: np.ndarray, weights: np.ndarray, combination: Combination) -> np.ndarray:
    weighted = tensors * weights.reshape(-1, *[1] * (tensors.ndim - 1))
    if not combination.rule.endswith("ties"):
        return np.asarray(weighted.sum(axis=0))
    elected = np.where(tensors.sum(axis=0) >= 0, 1, -1)
    agrees = np.sign(tensors) == elected
    count = np.maximum(agrees.sum(axis=0), 1).astype(F32)
    return np.asarray((weighted * agrees).sum(axis=0) / count)
