"""Measure conflicts between the adapters of a plan on the tensors that they share."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from weightsmith.core.values import JsonValue
from weightsmith.merging.combining.changes import Combined, Mixture, pair
from weightsmith.merging.combining.methods import LowRankDelta
from weightsmith.merging.outputs import MergedTensor, Term, bands
from weightsmith.merging.rounding import F64
from weightsmith.merging.stream import OpenFiles


def measure(outputs: Iterable[MergedTensor]) -> Conflicts:
    """Compare the adapters on every tensor to which at least two of them add factors.

    Changes other than low-rank terms, such as DoRA's norms, are not counted.
    """
    conflicts, files = Conflicts(), OpenFiles()
    try:
        for output in outputs:
            terms = terms_of(output)
            if len({term.adapter for term in terms}) < 2:
                continue
            for band in bands(replace(output, terms=terms, change=None)):
                pairs = defaultdict(list)
                for term in band.terms:
                    pairs[term.adapter].append(pair(term, band, files))
                if len(pairs) > 1:
                    conflicts.add(output.name, pairs)
    finally:
        files.close()
    return conflicts


def terms_of(output: MergedTensor) -> tuple[Term, ...]:
    """Return the low-rank terms of an output, however they are combined."""
    if isinstance(output.change, Combined | Mixture):
        return tuple(term for share in output.change.shares for term in share.claim.terms)
    return output.terms


_SAMPLED = 16
"""Rows per tensor on which signs are compared."""
_COSINE = -0.05
"""Below this cosine, adapters partly cancel each other; unrelated ones have about 0."""
_OPPOSED = 0.55
"""Fraction of opposing signs; unrelated adapters have one half."""
_RATIO = 10.0
"""Ratio of norms above which one delta dominates the other."""
_SHOWN = 3


@dataclass(slots=True)
class _Sums:
    """Sums over the tensors that two adapters both change."""

    dot: float = 0.0
    first: float = 0.0
    second: float = 0.0
    opposed: int = 0
    compared: int = 0
    cosines: dict[str, float] = field(default_factory=dict)

    @property
    def cosine(self) -> float:
        """The cosine of both adapters' deltas over all shared tensors."""
        return _cosine(self.dot, self.first, self.second)

    @property
    def ratio(self) -> float:
        low, high = sorted((math.sqrt(self.first), math.sqrt(self.second)))
        return high / low if low else math.inf

    @property
    def share(self) -> float:
        """The fraction of opposing signs among weights that both change."""
        return self.opposed / self.compared if self.compared else 0.0


class Conflicts:
    """Measures for each pair of adapters, accumulated over tensors."""

    def __init__(self) -> None:
        self._pairs: dict[tuple[int, int], _Sums] = {}

    def add(self, name: str, pairs: Mapping[int, Sequence[LowRankDelta]]) -> None:
        """Add a tensor; `pairs` maps an adapter's index to its weighted factors of the tensor.

        ⟨Δ₁, Δ₂⟩ = Σ (B₁ᵀB₂) ∘ (A₁A₂ᵀ) costs the factors' size times a rank.
        """
        norms = {number: inner(own, own) for number, own in pairs.items()}
        rows = {}
        for number, own in pairs.items():
            height = own[0].left.shape[0]
            places = np.linspace(0, height - 1, min(height, _SAMPLED)).astype(int)
            parts = [pair.gain * _gram(pair.left[places], pair.right) for pair in own]
            rows[number] = sum(parts[1:], start=parts[0])
        for one, two in itertools.combinations(sorted(pairs), 2):
            sums = self._pairs.setdefault((one, two), _Sums())
            dot = inner(pairs[one], pairs[two])
            sums.dot += dot
            sums.first += norms[one]
            sums.second += norms[two]
            signs = np.sign(rows[one]) * np.sign(rows[two])
            sums.opposed += int(np.count_nonzero(signs < 0))
            sums.compared += int(np.count_nonzero(signs))
            sums.cosines[name] = _cosine(dot, norms[one], norms[two])

    def report(self, adapters: Sequence[str]) -> list[dict[str, JsonValue]]:
        """Return one entry per pair of adapters: cosine, norm ratio, opposing signs, layers."""
        return [
            {
                "adapters": [adapters[one], adapters[two]],
                "cosine": round(sums.cosine, 4),
                "norm_ratio": round(sums.ratio, 4) if math.isfinite(sums.ratio) else None,
                "opposing_signs": round(sums.share, 4),
                "cosine_per_tensor": {n: round(c, 4) for n, c in sorted(sums.cosines.items())},
            }
            for (one, two), sums in sorted(self._pairs.items())
        ]

    def findings(self, adapters: Sequence[str]) -> list[str]:
        """Return one warning per pair of adapters that conflict."""
        found = []
        for (one, two), sums in sorted(self._pairs.items()):
            if sums.cosine < _COSINE or sums.share > _OPPOSED or sums.ratio > _RATIO:
                worst = sorted(sums.cosines.items(), key=lambda item: item[1])[:_SHOWN]
                found.append(
                    f"{adapters[one]} and {adapters[two]} conflict: cosine {sums.cosine:+.3f}, "
                    f"opposing signs in {sums.share:.0%} of the sampled weights, norms "
                    f"{sums.ratio:.3g} to 1; strongest in "
                    + ", ".join(f"{name} ({cosine:+.2f})" for name, cosine in worst)
                )
        return found


def inner(one: Sequence[LowRankDelta], two: Sequence[LowRankDelta]) -> float:
    """Return the inner product ⟨Δ₁, Δ₂⟩ of two low-rank deltas."""
    return sum(
        x.gain * y.gain * float((_gram(x.left.T, y.left) * _gram(x.right, y.right.T)).sum())
        for x in one
        for y in two
    )


def _gram(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    product: np.ndarray = one.astype(F64) @ two.astype(F64)
    return product


def _cosine(dot: float, first: float, second: float) -> float:
    size = math.sqrt(max(first, 0.0)) * math.sqrt(max(second, 0.0))
    return max(-1.0, min(1.0, dot / size)) if size else 0.0
