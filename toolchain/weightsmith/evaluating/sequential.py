"""Tests a drop question by question: it may stop after any of them, and its error rate holds.

An image counts as proven if the hypothesis that its mean drop is the limit or more is refuted.
The tests of this file may be looked at after each question. Three things are fixed before the
first question is asked, so that no answer can influence them: the order of the questions, the bets,
and the level of each candidate.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

from weightsmith.core.values import Score, key_of
from weightsmith.evaluating.gate import Rule
from weightsmith.evaluating.items import Item

ERROR = 0.05
"""The largest chance that what is chosen drops by more than the limit of one of its suites."""
_FULL = 1.0
_SHARES = (_FULL, 0.9, 0.75, 0.5, 0.25)
"""Of the largest bet that cannot lose more than all. A full bet wins fastest and survives no lost
question; the others are the best ones where losses have 0.1 to 0.75 of the rate of the limit."""
_SPARE = 0.75
"""Share of the questions that must suffice if no answer changes: the rest makes up for losses."""


def questions_needed(limit: float, level: float) -> int:
    """Return how many questions refute a drop of `limit` if no answer changes; 0 if none do.

    Such questions have a chance of at most (1 - limit)^n if the drop is `limit`.
    """
    if not 0 < limit < 1:
        return 0
    return max(1, math.ceil(math.log(level) / math.log1p(-limit) - 1e-9))


def candidates_testable(suites: Sequence[tuple[int, float]], most: int) -> int:
    """Return how many candidates may be tested, given each suite's questions and limit.

    Each is tested at the same part of `ERROR` (Bonferroni): the first one that is proven is
    published, so an error is made if one of them is wrongly proven. Tests in a fixed order, without
    such parts, must stop at the first that fails: they would have to begin with the dearest image.
    More candidates would leave each too small a part to be proven with these questions. 0 if even
    one alone cannot be proven.
    """

    def suffice(count: int, share: float) -> bool:
        level = ERROR / count
        return all(
            limit >= 1 or 0 < questions_needed(limit, level) <= share * n for n, limit in suites
        )

    if not suffice(1, 1.0):
        return 0
    return max(1, len([*takewhile(lambda count: suffice(count, _SPARE), range(1, most + 1))]))


def asking_order(items: Sequence[Item]) -> tuple[int, ...]:
    """Return the order in which questions are asked: by digests, whatever order the file has."""
    places = {n: key_of(["sequence", item.asks]) for n, item in enumerate(items)}
    return tuple(sorted(places, key=places.__getitem__))


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A drop as far as questions were asked, and what is known of it."""

    asked: int
    lost: int
    """Number of questions with a worse answer."""
    won: int
    drop: float
    low: float
    high: float
    """Both ends hold after every question at once, each but for a chance of `level`."""
    proven_at: int
    """The number of the question after which the drop was proven; 0 if it was not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DropTest:
    """A test that the mean drop of a score is below a limit.

    Capital begins with 1 and bets on each question that the drop is smaller: it is multiplied by
    1 + b (limit - drop). If the mean drop is `limit` or more, no bet is expected to win, so the
    capital ever reaches 1 / level with a chance of at most `level`, for drops of any distribution
    from -1 to 1 (Ville's inequality). The capital is parted among several b, fixed before.
    Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting", Journal of
    the Royal Statistical Society B 86, 2024, section 4; a mixture of bets is a martingale, too. The
    drops are those of questions drawn at random from all that users may ask.

    Several suites are each tested at the same level: all of them must be proven, so the chance that
    they wrongly are is that of one (Berger, "Multiparameter hypothesis testing and acceptance
    sampling", 1982).
    """

    limit: float
    level: float
    questions: int
    """How many can be asked."""

    @property
    def parts(self) -> tuple[float, ...]:
        """The capital that each of `_SHARES` begins with.

        The full bet has as much as it needs to prove the limit if no answer changes.
        """
        others = len(_SHARES) - 1
        needed = (1 - self.limit) ** self.questions / self.level if self.limit < 1 else 1.0
        full = min(1.0, max(1 / len(_SHARES), needed * (1 + 1e-9)))
        return (full, *[(1 - full) / others] * others)

    def wealth(self, drops: Mapping[float, int], mean: float) -> float:
        """Return the logarithm of the capital against a mean drop, given how often each was seen.

        It does not depend on the order of the questions.
        """
        return _sum(
            _log(part)
            + math.fsum(n * _log(_factor(share, mean, drop)) for drop, n in drops.items())
            for part, share in zip(self.parts, _SHARES, strict=True)
        )

    @property
    def _goal(self) -> float:
        return -math.log(self.level) - 1e-9

    def hopeless(self, drops: Mapping[float, int]) -> bool:
        """Return whether the questions that are left cannot prove it, if no more answers change."""
        left = self.questions - sum(drops.values())
        unchanged = {**drops, 0.0: drops.get(0.0, 0) + left}
        return self.limit < 1 and self.wealth(unchanged, self.limit) < self._goal

    def proven_at(self, drops: Sequence[float]) -> int:
        """Return the number of the question after which it was proven; 0 if it was not."""
        if self.limit >= 1:
            return min(1, len(drops))
        capital, factors = self.parts, dict[float, tuple[float, ...]]()
        for number, drop in enumerate(drops, start=1):
            if drop not in factors:
                factors[drop] = tuple(_factor(share, self.limit, drop) for share in _SHARES)
            capital = tuple(map(operator.mul, capital, factors[drop]))
            if sum(capital) * self.level >= 1 - 1e-9:
                return number
        return 0

    def interval(self, drops: Sequence[float]) -> Interval:
        """Return what these drops, in the order of asking, say of the mean drop."""
        return Interval(
            asked=len(drops),
            lost=sum(drop > 0 for drop in drops),
            won=sum(drop < 0 for drop in drops),
            drop=math.fsum(drops) / len(drops) if drops else 0.0,
            low=-self._highest(Counter(-drop for drop in drops)),
            high=self._highest(Counter(drops)),
            proven_at=self.proven_at(drops),
        )

    def _highest(self, drops: Mapping[float, int]) -> float:
        """Return the smallest mean drop that is refuted; capital against a larger one is larger."""
        low, high = -1.0, 1.0
        for _ in range(40):
            middle = (low + high) / 2
            if self.wealth(drops, middle) >= self._goal:
                high = middle
            else:
                low = middle
        return high


def _factor(share: float, mean: float, drop: float) -> float:
    return 1 + share * (mean - drop) / (1 - mean)


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf


def _sum(logs: Iterable[float]) -> float:
    """Return the logarithm of the sum of what these are the logarithms of."""
    logs = [*logs]
    if (top := max(logs)) == -math.inf:
        return top
    return top + math.log(math.fsum(math.exp(one - top) for one in logs))


def limit_of(rule: Rule) -> float:
    """Return the drop that must be refuted; of a minimum score, the drop from all being right."""
    return rule.max_drop if rule.against else 1 - rule.min_score


def drops_of(rule: Rule, now: Sequence[float], reference: Score | None) -> list[float]:
    """Return each question's drop from the reference's score; of a minimum score, from 1."""
    before = reference.values if reference and rule.against else [1.0] * len(now)
    return [was - is_ for was, is_ in zip(before, now, strict=True)]
