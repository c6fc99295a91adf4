"""Confidence intervals of shares and paired comparisons; no dependencies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_Z = 1.96
"""Standard normal quantile of a two-sided 95 % interval."""


def wilson(right: int, n: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a share; (0, 1) for n = 0.

    Wilson, "Probable inference, the law of succession, and statistical inference", 1927.
    """
    if n == 0:
        return 0.0, 1.0
    share = right / n
    middle = (share + _Z * _Z / (2 * n)) / (1 + _Z * _Z / n)
    half = _Z / (1 + _Z * _Z / n) * math.sqrt(share * (1 - share) / n + _Z * _Z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def mcnemar(lost: int, won: int) -> float:
    """Return the two-sided p value of McNemar's exact test.

    Twice the binomial tail of the smaller count: McNemar, "Note on the sampling error of the
    difference between correlated proportions", 1947, in its exact form.
    """
    n = lost + won
    tail = term = 1
    # Each coefficient from the one before: from scratch, 50,000 changed answers took minutes.
    for k in range(min(lost, won)):
        term = term * (n - k) // (k + 1)
        tail += term
    # Integer division, because floats would overflow.
    return min(1.0, 2 * tail / (1 << n))


def paired_interval(lost: int, won: int, n: int) -> tuple[float, float]:
    """Return the 95 % interval of (lost - won) / n, the drop of a score over the same n items.

    Bonett and Price, "Adjusted Wald confidence interval for a difference of binomial proportions
    based on paired data", 2012; (-1, 1) for n = 0.
    """
    if n == 0:
        return -1.0, 1.0
    lost_share, won_share = (lost + 1) / (n + 2), (won + 1) / (n + 2)
    middle = lost_share - won_share
    half = _Z * math.sqrt((lost_share + won_share - middle**2) / (n + 2))
    return max(-1.0, middle - half), min(1.0, middle + half)


def least_drop(n: int) -> float:
    """Return the smallest `max_drop` that n items can show: the bound if no answer changes."""
    return paired_interval(0, 0, n)[1]


def items_needed(max_drop: float) -> int:
    """Return the number of items needed to show a drop of at most `max_drop` if no answer changes.

    The n at which the upper end of `paired_interval(0, 0, n)` reaches it; 0 for a `max_drop` of 0,
    which no number of items can show.
    """
    if max_drop <= 0:
        return 0
    return max(1, math.ceil(_Z * math.sqrt(2) / max_drop - 2 - 1e-9))


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedComparison:
    """A paired comparison over the same items."""

    lost: int
    """Items that were right before and are wrong now."""
    won: int
    n: int

    @property
    def drop(self) -> float:
        """Decrease of the score; negative if it rose."""
        return (self.lost - self.won) / self.n if self.n else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the drop."""
        return paired_interval(self.lost, self.won, self.n)

    @property
    def p(self) -> float:
        """McNemar's exact p value."""
        return mcnemar(self.lost, self.won)


def compare(now: Sequence[bool], before: Sequence[bool]) -> PairedComparison:
    """Compare two subjects' correctness, in the items' order.

    Raises ValueError for different numbers of items.
    """
    pairs = list(zip(now, before, strict=True))
    return PairedComparison(
        lost=sum(was and not is_ for is_, was in pairs),
        won=sum(is_ and not was for is_, was in pairs),
        n=len(pairs),
    )
