"""Round the few elements that the first pass could not: in float64, else with exact integers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from weightsmith.core.small_floats import as_float
from weightsmith.merging import native
from weightsmith.merging.rounding import F64, FORMATS, Binary, round_dyadic, round_once

_CHUNK = 1 << 18
"""Products computed at once: they fit into the second-level cache in float64."""
_UNIT = 2.0**-53


@dataclass(frozen=True, kw_only=True)
class LowRankUpdate:
    """The addition to one tensor, Σₖ gain[k] · left[:, k] · right[k, :].

    `left` (rows, K) and `right` (K, columns) are float32 and finite, `gains` (K,) is float64.
    """

    left: np.ndarray
    right: np.ndarray
    gains: np.ndarray

    @cached_property
    def columns(self) -> np.ndarray:
        """`right` transposed, so that a column is contiguous."""
        return np.ascontiguousarray(self.right.T)

    @cached_property
    def norms(self) -> np.ndarray:
        """(rows,): ‖gains · left[i]‖ in float64."""
        return _norms(self.left, self.gains)

    @cached_property
    def norm(self) -> float:
        """The largest ‖right[:, j]‖, so that norms[i] · norm bounds Σₖ|terms| (Cauchy-Schwarz)."""
        return float(_norms(self.columns, np.ones(1)).max(initial=0.0))


def _norms(matrix: np.ndarray, gains: np.ndarray) -> np.ndarray:
    """Return ‖gains · row‖ of each row in float64, some rows at a time to save memory."""
    step = max(1, _CHUNK // max(1, matrix.shape[1]))
    parts = [np.empty(0)]
    for start in range(0, len(matrix), step):
        with np.errstate(over="ignore"):
            scaled = matrix[start : start + step] * gains
            parts.append(np.sqrt(np.einsum("ij,ij->i", scaled, scaled)))
    return np.concatenate(parts)


@dataclass(slots=True)
class Repairs:
    """Numbers of elements decided in float64, and by exact integers."""

    float64: int = 0
    exact: int = 0


def repair(
    factors: LowRankUpdate,
    weights: np.ndarray,
    rows: np.ndarray,
    columns: np.ndarray,
    dtype: np.dtype,
) -> tuple[np.ndarray, Repairs]:
    """Return the correctly rounded sums at (rows[i], columns[i]); `weights[i]` is the base's value.

    `rows` are rows of `factors.left`.
    """
    step = max(1, _CHUNK // max(1, len(factors.gains)))
    done, out = Repairs(), np.empty(len(weights), dtype)
    for start in range(0, len(weights), step):
        part = slice(start, start + step)
        base = as_float(weights[part], F64)
        out[part] = _decide(factors, rows[part], columns[part], base, dtype, done)
    return out, done


def _decide(
    factors: LowRankUpdate,
    rows: np.ndarray,
    columns: np.ndarray,
    base: np.ndarray,
    dtype: np.dtype,
    done: Repairs,
) -> np.ndarray:
    """Round n sums.

    gain · left · right has at most two roundings, so the sum of K terms has an error below
    (K + 2) · 2**-53 · Σ|terms| to first order, in any order of summation (Higham, "Accuracy and
    Stability of Numerical Algorithms", section 3.1). The bound used is larger.
    """
    form, gains = FORMATS[dtype], factors.gains
    reach = factors.norms[rows] * factors.norm  # an upper bound of Σ|terms|
    with np.errstate(over="ignore", invalid="ignore"):
        added = native.dot_products(factors.left, factors.columns, factors.gains, rows, columns)
        if added is None:
            left, right = factors.left[rows], factors.columns[columns].astype(F64)
            added = np.einsum("ij,ij->i", left * factors.gains, right)
        total = base + added
        error = reach * ((len(gains) + 8) * 2 * _UNIT)
        error += np.abs(total) * (8 * _UNIT) + 2.0**-1000
    high = round_once(total + error, dtype)
    low = round_once(total - error, dtype)
    unsure = (high.view(form.bits) != low.view(form.bits)) | ~np.isfinite(error)
    done.float64 += len(base)
    undecided = np.flatnonzero(unsure)
    done.exact += len(undecided)
    for i in undecided:
        left, right = factors.left[rows[i]], factors.columns[columns[i]]
        exact = _exact(left.astype(F64), right.astype(F64), gains, float(base[i]), form)
        high.view(form.bits)[i] = exact
    return high


def _exact(
    left: np.ndarray, right: np.ndarray, gains: np.ndarray, base: float, form: Binary
) -> int:
    """Return the bits of base + Σ gain · left · right, rounded once from the exact value.

    A sum of exactly zero is +0, but adding zero keeps the base with its sign.
    """
    (lm, le), (rm, re), (gm, ge) = _integers(left), _integers(right), _integers(gains)
    exponents = [a + b + c for a, b, c in zip(le, re, ge, strict=True)]
    lowest = min(exponents, default=0)
    delta = sum(a * b * c << (e - lowest) for a, b, c, e in zip(lm, rm, gm, exponents, strict=True))
    (mantissa,), (exponent,) = _integers(np.array([base]))
    if delta == 0 and mantissa == 0:
        return int(np.signbit(base)) << (form.width - 1)
    shared = min(lowest, exponent)
    total = (delta << (lowest - shared)) + (mantissa << (exponent - shared))
    return round_dyadic(total, shared, form) if total else 0


def _integers(values: np.ndarray) -> tuple[list[int], list[int]]:
    mantissas, exponents = np.frexp(values)
    return (mantissas * 2.0**53).astype(np.int64).tolist(), (exponents - 53).tolist()
