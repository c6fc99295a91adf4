"""Combine low-rank deltas by concatenation or truncation, without forming whole deltas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from weightsmith.core.errors import CheckFailed
from weightsmith.merging.rounding import F32, F64

Factors = tuple[np.ndarray, np.ndarray]
"""(rows, rank) and (rank, columns)."""


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
