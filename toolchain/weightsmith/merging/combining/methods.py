"""What each method does: prune deltas and combine them or PEFT's factors, or truncate the sum.

A delta is what one adapter at weight 1 changes, which is well defined for all kinds. PEFT combines
A and B separately, which adds cross terms and ignores what is no factor; `--space factors` does the
same for models that were evaluated that way (`peft.tuners.lora.model`, version 0.21), bit for bit.

DARE draws from a counter-based stream keyed by seed, tensor and adapter, so that neither threads
nor the order of adapters change the result.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from weightsmith.core.errors import CheckFailed
from weightsmith.merging.combining.combination import Combination
from weightsmith.merging.rounding import F32, F64

_CHUNK = 1 << 20
"""Elements per call of the generator; must be even; the result does not depend on it."""
Factors = tuple[np.ndarray, np.ndarray]
"""(rows, rank) and (rank, columns)."""


def keep_largest(delta: np.ndarray, density: float) -> np.ndarray:
    """Zero all but the ⌊density · n⌋ weights of largest magnitude in place; return the delta.

    `delta` is float32 and contiguous. Among equal magnitudes the first in row order are kept, so
    the result is deterministic (PEFT's `torch.topk` is not). This is the trimming of TIES (Yadav
    et al., "TIES-Merging", 2023, section 4) per tensor, as in PEFT.
    """
    flat = delta.reshape(-1)
    kept = int(density * len(flat))
    if kept >= len(flat):
        return delta
    if kept == 0:
        flat[:] = 0
        return delta
    # Magnitudes of floats sort like their bits.
    bits = flat.view(np.uint32) & np.uint32(0x7FFFFFFF)
    least = np.partition(bits, len(bits) - kept)[len(bits) - kept]
    drop = bits < least
    equal = np.flatnonzero(bits == least)
    drop[equal[kept - int(np.count_nonzero(bits > least)) :]] = True
    flat[drop] = 0
    return delta


def drop_at_random(delta: np.ndarray, density: float, *names: str) -> np.ndarray:
    """Keep each weight with probability `density` and divide it by that, in place.

    DARE (Yu et al., "Language Models are Super Mario", 2023). The draws depend only on `names`
    (seed, tensor and adapter) and the weight's position in row order, not on threads, blocks or
    the order of tensors. The generator is Philox 4x64 keyed by the SHA-256 of the names.
    """
    flat = delta.reshape(-1)
    digest = hashlib.sha256("\0".join(names).encode()).digest()
    stream = np.random.Philox(key=int.from_bytes(digest[:16], "little"))
    limit = math.floor(density * 2**32)
    for start in range(0, len(flat), _CHUNK):
        part = flat[start : start + _CHUNK]
        draws = stream.random_raw((len(part) + 1) // 2).view(np.uint32)[: len(part)]
        part /= np.float32(density)
        part[draws >= limit] = 0
    return delta


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
        sign = np.where(sum(parts[1:], start=parts[0]) >= 0, 1.0, -1.0)
        total, count = np.zeros_like(sign), np.zeros_like(sign)
        for part, weight in zip(parts, weights, strict=True):
            agrees = np.sign(part) == sign
            total += part * agrees * weight
            count += agrees
        mean: np.ndarray = total / np.maximum(count, 1.0)
        return mean
    return sum(
        (part * weight for part, weight in zip(parts[1:], weights[1:], strict=True)),
        start=parts[0] * weights[0],
    )


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
    density, sides = combination.density or 1.0, []
    for side, weights in (("a", signed), ("b", roots)):
        tensors = np.stack([getattr(factor, side) for factor in factors])
        for tensor, factor in zip(tensors, factors, strict=True):
            if density < 1 and combination.random:
                names = (str(combination.seed), name, f"{side} {factor.adapter}")
                drop_at_random(tensor, density, *names)
            elif density < 1:
                keep_largest(tensor, density)
        weighted = tensors * np.array(weights, F32)[:, None, None]
        if combination.rule.endswith("ties"):
            elected = np.where(tensors.sum(axis=0) >= 0, 1, -1)
            agrees = np.sign(tensors) == elected
            count = np.maximum(agrees.sum(axis=0), 1).astype(F32)
            sides.append(np.asarray((weighted * agrees).sum(axis=0) / count))
        else:
            sides.append(np.asarray(weighted.sum(axis=0)))
    return sides[0], sides[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRankDelta:
    """One adapter's delta of a tensor: gain · left · right."""

    left: np.ndarray
    """(rows, rank)."""
    right: np.ndarray
    """(rank, columns)."""
    gain: float
    """weight · scaling."""


def concatenate(pairs: Sequence[LowRankDelta]) -> Factors:
    """Return float64 factors of Σ gain · left · right, whose rank is the sum of the ranks.

    The right factor includes the gains.
    """
    left = np.concatenate([pair.left.astype(F64) for pair in pairs], 1)
    right = np.concatenate([pair.right.astype(F64) * pair.gain for pair in pairs], 0)
    return left, right


def truncate(pairs: Sequence[LowRankDelta], rank: int) -> Factors:
    """Return the best float64 factors of at most `rank` for Σ gain · left · right.

    Best in the Frobenius norm (Eckart and Young). With thin QRs L = Q₁R₁ and Rᵀ = Q₂R₂, the
    singular values are those of the small matrix R₁R₂ᵀ. The left factor includes them, as in PEFT.
    """
    left, right = concatenate(pairs)
    q1, r1 = np.linalg.qr(left)
    q2, r2 = np.linalg.qr(right.T)
    u, s, vh = np.linalg.svd(r1 @ r2.T, full_matrices=False)
    return q1 @ (u[:, :rank] * s[:rank]), vh[:rank] @ q2.T


def truncate_whole(delta: np.ndarray, rank: int) -> Factors:
    """Return the best float64 factors of at most `rank` for a whole delta.

    Uses the eigenvectors of the smaller Gram matrix, which costs a fraction of a full SVD and
    loses only singular values below 1e-8 of the largest.
    """
    matrix = delta.astype(F64)
    wide = matrix.shape[0] <= matrix.shape[1]
    gram = matrix @ matrix.T if wide else matrix.T @ matrix
    top = np.linalg.eigh(gram).eigenvectors[:, ::-1][:, :rank]
    return (top, top.T @ matrix) if wide else (matrix @ top, top.T)


def to_float32(factors: Factors, name: str) -> Factors:
    """Return both factors in float32, scaled to similar norms to avoid over- and underflow.

    Raises CheckFailed with the tensor's name if they are not finite.
    """
    left, right = factors
    norms = np.linalg.norm(left, axis=0), np.linalg.norm(right, axis=1)
    both = (norms[0] > 0) & (norms[1] > 0)
    ratio = np.divide(norms[1], norms[0], out=np.ones_like(norms[0]), where=both)
    # Scaling by a power of two is exact.
    shift = np.exp2(np.round(np.log2(ratio) / 2))
    with np.errstate(over="ignore"):
        single = (left * shift).astype(F32), (right / shift[:, None]).astype(F32)
    if not all(np.isfinite(side).all() for side in single):
        raise CheckFailed(
            f"the combined factors of {name} are not finite",
            hint="an adapter has very large values; lower its weight",
        )
    return single
