"""What `auto` chooses where both the length of a request and the number at once are left to it.

A server is asked by several clients, so the longest request that fits alone is of no use to it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

from weightsmith.core.values import JsonValue

USEFUL = 8192
"""Tokens: a request of this length is not made longer for fewer at once than wanted."""
_SHORTEST = 1024
"""Tokens: `auto` takes no request that is shorter, unless the model's own are."""
_ROWS = 6


class Fitting(ABC):
    """A model on a machine: what fits there."""

    __slots__ = ()

    @property
    @abstractmethod
    def step(self) -> int:
        """Tokens: lengths below the wanted one are multiples of it."""

    @abstractmethod
    def fits(self, tokens: int, requests: int) -> bool:
        """Say whether so many requests of that length are in the cache together."""

    def longest(self, requests: int, most: int) -> int:
        """Return the longest request up to `most` of which so many fit; 0: none."""
        if self.fits(most, requests):
            return most
        step = self.step
        return step * largest(lambda n: self.fits(n * step, requests), -(-most // step) - 1)

    def most_requests(self, tokens: int, limit: int) -> int:
        """Return how many requests of that length fit, up to `limit`; 0: none."""
        return largest(lambda number: self.fits(tokens, number), limit)


def largest(fits: Callable[[int], bool], limit: int) -> int:
    """Return the largest number up to a limit that fits, where all smaller ones do too; 0: none."""
    low, high = 0, limit + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def choose_length(capacity: Fitting, own: int, wanted: int) -> int:
    """Return the length of a request; 0 if none fits.

    It is the longest of the model's `own` length and the powers of two at which `wanted` requests
    fit. If that is less than 8192, half as many are enough, and so on; one may have any length.
    """
    while wanted > 1:
        length = capacity.longest(wanted, own)
        usual = length if length == own else _power_of_two(length)
        if usual >= min(USEFUL, own):
            return usual
        wanted //= 2
    return capacity.longest(1, own)


def usable(length: int, own: int) -> int:
    """Return the length that fits, if it is of use; else one whose refusal says what it takes."""
    return length if length >= min(_SHORTEST, own) else min(USEFUL, own)


def rule(own: int, wanted: int) -> str:
    """Return how `choose_length` chooses, for people."""
    return (
        f"auto takes the longest of {own} tokens and the powers of two at which {wanted} requests"
        f" fit at once, and rather fewer requests than less than {min(USEFUL, own)} tokens"
    )


def choices(
    capacity: Fitting, own: int, limit: int, chosen: int
) -> tuple[Mapping[str, JsonValue], ...]:
    """Return how many requests fit at other lengths, from the longest to some below the chosen.

    Of lengths at which as many fit, only the longest; () if there is nothing to choose between.
    """
    lengths, length = [capacity.longest(1, own)], own
    while (length := _power_of_two(length - 1)) >= min(chosen, max(_SHORTEST, chosen // 4)) > 0:
        lengths.append(length)
    rows: dict[int, int] = {}
    for tokens in sorted({*lengths, chosen} - {0}, reverse=True):
        rows.setdefault(capacity.most_requests(tokens, limit), tokens)
    found = [{"max_model_len": n, "max_num_seqs": most} for most, n in rows.items() if most]
    return (found[0], *found[1:][1 - _ROWS :]) if len(found) > 1 else ()


def _power_of_two(most: int) -> int:
    return 1 << most.bit_length() - 1 if most > 0 else 0
