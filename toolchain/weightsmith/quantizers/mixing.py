"""Chooses a type for each matrix, so that a file within a budget loses as little as possible.

This is the multiple-choice knapsack problem (Kellerer, Pferschy and Pisinger, Knapsack Problems,
2004, chapter 11): losses add up, and exactly one type of each matrix is taken.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

_CELLS = 1 << 26
"""Bytes of the table of choices."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A type that a matrix may have."""

    kind: str
    size: int
    """Bytes of the matrix."""
    loss: float
    """What the model loses by it, in any unit that adds up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """A type for each matrix."""

    kinds: Mapping[str, str]
    size: int
    """Bytes of all matrices."""
    loss: float
    bound: float
    """No mix of the same budget loses less than this."""


def smallest(choices: Mapping[str, Sequence[Choice]]) -> int:
    """Return the bytes of the smallest mix."""
    return sum(min(one.size for one in each) for each in choices.values())


def choose(choices: Mapping[str, Sequence[Choice]], budget: int) -> Mix:
    """Return the mix of at most `budget` bytes that loses the least.

    It is the optimum where the table of a dynamic program has room for every sum of sizes. Where
    sizes had to be rounded up to fewer sums, what that leaves of the budget is filled greedily, and
    `bound`, from the Lagrangian relaxation (chapter 11.2), says how much smaller a loss could be.
    The same input gives the same mix. Raises ValueError for a budget below the smallest mix.
    """
    left = budget - smallest(choices)
    if left < 0:
        raise ValueError(f"a mix has at least {budget - left} bytes, more than {budget}")
    names = sorted(choices)
    rows = [_undominated(choices[name]) for name in names]
    sizes = [np.array([one.size - row[0].size for one in row], np.int64) for row in rows]
    losses = [np.array([one.loss for one in row]) for row in rows]
    left = min(left, sum(int(each[-1]) for each in sizes))
    taken = _fill(sizes, losses, left, _table(sizes, losses, left))
    chosen = [row[at] for row, at in zip(rows, taken, strict=True)]
    return Mix(
        kinds={name: one.kind for name, one in zip(names, chosen, strict=True)},
        size=sum(one.size for one in chosen),
        loss=math.fsum(one.loss for one in chosen),
        bound=_bound(sizes, losses, left),
    )


def _undominated(row: Sequence[Choice]) -> list[Choice]:
    """Return the choices that lose less than each smaller one, smallest first."""
    kept: list[Choice] = []
    for one in sorted(row, key=lambda one: (one.size, one.loss, one.kind)):
        if not kept or one.loss < kept[-1].loss:
            kept.append(one)
    return kept


def _table(sizes: list[np.ndarray], losses: list[np.ndarray], left: int) -> list[int]:
    """Return the best choice of each row, by a dynamic program over the bytes that are left."""
    common = math.gcd(*(int(size) for each in sizes for size in each)) or 1
    least = -(-left * len(sizes) // _CELLS)  # so that the table has room
    unit = common * max(1, -(-least // common))
    room = left // unit
    best = np.zeros(room + 1)
    taken = np.zeros((len(sizes), room + 1), np.uint8)
    for number, (size, loss) in enumerate(zip(sizes, losses, strict=True)):
        new = np.full(room + 1, np.inf)
        for at, (units, cost) in enumerate(zip(-(-size // unit), loss, strict=True)):
            if units > room:
                break
            made = best[: room + 1 - units] + cost
            better = made < new[units:]
            new[units:][better] = made[better]
            taken[number, units:][better] = at
        best = new
    found, place = [0] * len(sizes), room
    for number in reversed(range(len(sizes))):
        found[number] = int(taken[number, place])
        place -= -(-int(sizes[number][found[number]]) // unit)
    return found


def _fill(
    sizes: list[np.ndarray], losses: list[np.ndarray], left: int, taken: list[int]
) -> list[int]:
    """Spend what rounded sizes have left, each time where a byte saves most."""
    taken = list(taken)
    spare = left - sum(int(size[at]) for size, at in zip(sizes, taken, strict=True))
    while True:
        better = [
            ((loss[at] - loss[to]) / (size[to] - size[at]), -row, to)
            for row, (size, loss, at) in enumerate(zip(sizes, losses, taken, strict=True))
            for to in range(at + 1, len(size))
            if size[to] - size[at] <= spare
        ]
        if not better:
            return taken
        _, row, to = max(better)
        spare -= int(sizes[-row][to] - sizes[-row][taken[-row]])
        taken[-row] = to


def _bound(sizes: list[np.ndarray], losses: list[np.ndarray], left: int) -> float:
    """Return the largest lower bound of the loss that a price per byte gives.

    For each price p >= 0 that is the sum over rows of min(loss + p size), less p times the bytes
    that are left: concave in p, and largest where the price is a slope of a row's convex hull.
    """
    slopes = {0.0} | {
        float((loss[a] - loss[b]) / (size[b] - size[a]))
        for size, loss in zip(sizes, losses, strict=True)
        for a in range(len(size))
        for b in range(a + 1, len(size))
    }
    prices = sorted(slopes)

    def value(at: int) -> float:
        price = prices[at]
        rows = zip(sizes, losses, strict=True)
        return math.fsum(float((loss + price * size).min()) for size, loss in rows) - price * left

    low, high = 0, len(prices) - 1
    while high - low > 2:  # ternary search of a concave function
        a = low + (high - low) // 3
        b = high - (high - low) // 3
        if value(a) < value(b):
            low = a + 1
        else:
            high = b
    return max(value(at) for at in range(low, high + 1))
