"""The few elements that float arithmetic could not decide: float64 first, exact integers last."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from toolchain.merging.rounding import FORMATS, Binary, round_dyadic, round_once

_CHUNK = 1 << 20
_UNIT = 2.0**-53


@dataclass(frozen=True, slots=True, kw_only=True)
class Factors:
    """The exact addition to one tensor, Σₖ gain[k] · left[:, k] · right[k, :].

    `left` (rows, K) and `right` (K, columns) are float32 and finite, `gains` (K,) is float64.
    """

    left: torch.Tensor
    right: torch.Tensor
    gains: torch.Tensor
    columns: torch.Tensor = field(init=False)
    """`right` transposed, so that a column is read from one place."""
    norms: torch.Tensor = field(init=False)
    """(rows,): ‖gains · left[i]‖ in float64."""
    norm: float = field(init=False)
    """The largest ‖right[:, j]‖, so that norms[i] · norm bounds Σₖ|terms| (Cauchy-Schwarz)."""

    def __post_init__(self) -> None:
        """Lay the columns out and measure both sides."""
        columns = self.right.T.contiguous()
        scaled = self.left.double().mul_(self.gains)
        object.__setattr__(self, "columns", columns)
        object.__setattr__(self, "norms", torch.linalg.vector_norm(scaled, dim=1))
        norms = torch.linalg.vector_norm(columns, dim=1, dtype=torch.float64)
        object.__setattr__(self, "norm", float(norms.max()))


@dataclass(slots=True)
class Repairs:
    """How many elements needed more than the first pass, and where they were decided."""

    float64: int = 0
    exact: int = 0


def repair(
    factors: Factors,
    weights: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, Repairs]:
    """Return the correctly rounded sums at (rows[i], columns[i]); `weights[i]` is the base's value.

    `rows` are rows of `factors.left`; all tensors lie on the CPU.
    """
    step = max(1, _CHUNK // max(1, len(factors.gains)))
    done, parts = Repairs(), []
    for start in range(0, len(weights), step):
        part = slice(start, start + step)
        left = factors.left[rows[part]].double()
        right = factors.columns[columns[part]].double()
        reach = factors.norms[rows[part]] * factors.norm
        parts.append(_decide(left, right, factors.gains, reach, weights[part], dtype, done))
    return torch.cat(parts), done


def _decide(
    left: torch.Tensor,
    right: torch.Tensor,
    gains: torch.Tensor,
    reach: torch.Tensor,
    weights: torch.Tensor,
    dtype: torch.dtype,
    done: Repairs,
) -> torch.Tensor:
    """Round n sums, given their factors (n, K) in float64 and what Σ|terms| cannot exceed.

    A product of two float32 is exact in float64, so each term has one rounding and the sum of K of
    them an error below (K + 1) · 2**-53 · Σ|terms| to first order, in any order of summation
    (Higham, "Accuracy and Stability of Numerical Algorithms", section 3.1). The bound is generous.
    """
    form = FORMATS[dtype]
    terms = (left * right).mul_(gains)
    base = weights.double()
    total = base + terms.sum(1)
    error = reach * ((len(gains) + 8) * 2 * _UNIT)
    error += total.abs() * (8 * _UNIT) + 2.0**-1000
    rounded = round_once(torch.stack((total + error, total - error)), dtype)
    high: torch.Tensor = rounded[0]
    unsure = (high.view(form.bits) != rounded[1].view(form.bits)) | ~torch.isfinite(error)
    undecided = unsure.nonzero().flatten()
    done.float64 += len(weights)
    done.exact += len(undecided)
    if len(undecided):
        bits = [
            _exact(left[i].numpy(), right[i].numpy(), gains.numpy(), float(base[i]), form)
            for i in undecided.tolist()
        ]
        # Unsigned bits above the middle stand for negative integers.
        signed = [b - (b >> (form.width - 1) << form.width) for b in bits]
        high.view(form.bits)[undecided] = torch.tensor(signed, dtype=form.bits)
    return high


def _exact(
    left: np.ndarray, right: np.ndarray, gains: np.ndarray, base: float, form: Binary
) -> int:
    """Return the bits of base + Σ gain · left · right, rounded once from the exact number.

    A sum of exact zero is +0, but adding nothing leaves the base as it is, its sign included.
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
    """Return float64 values as integers and exponents of two."""
    mantissas, exponents = np.frexp(values)
    return (mantissas * 2.0**53).astype(np.int64).tolist(), (exponents - 53).tolist()
