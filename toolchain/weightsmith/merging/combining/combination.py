"""How several adapters become one: the request, checked before any work; no torch here."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from weightsmith.errors import UsageError

SUMS = ("sequential", "linear", "cat")
"""One weighted sum of the deltas, whatever the name."""
PRUNING = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
TRUNCATING = ("svd", *(f"{method}_svd" for method in PRUNING))
METHODS = (*SUMS, "svd", *PRUNING, *TRUNCATING[1:])
SPACES = ("delta", "factors")
KEEPABLE = ("sequential", "linear", "cat", *TRUNCATING)
"""Methods whose result is an adapter again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Combination:
    """A method and its parameters; raises UsageError where they do not go together."""

    method: str = "sequential"
    density: float | None = None
    """Share of each delta that pruning keeps, in (0, 1]."""
    rank: int | None = None
    """Of a truncated result; without it, the largest rank that goes in."""
    seed: int = 0
    """Of DARE's masks."""
    space: str = "delta"
    """`delta`: methods act on B·A; `factors`: on A and B apart, as PEFT defines it."""

    @classmethod
    def of(cls, options: Any) -> Combination:
        """Return those of a merge's options that say how adapters become one."""
        return cls(**{field.name: getattr(options, field.name) for field in fields(cls)})

    def __post_init__(self) -> None:
        """Refuse what would be ignored or guessed."""
        if self.method not in METHODS:
            raise UsageError(
                f"unknown merge method {self.method!r}", hint=f"one of {', '.join(METHODS)}"
            )
        if self.space not in SPACES:
            raise UsageError(f"unknown space {self.space!r}", hint=f"one of {', '.join(SPACES)}")
        self._check_density()
        if self.rank is not None and (self.method not in TRUNCATING or self.rank < 1):
            raise UsageError(
                f"rank {self.rank} with method {self.method}",
                hint=f"a positive rank, with one of {', '.join(TRUNCATING)}",
            )
        if self.seed < 0 or (self.seed and not self.random):
            raise UsageError(
                f"seed {self.seed} with method {self.method}",
                hint="a seed of 0 or more, with one of the dare methods: the other methods draw "
                "nothing at random",
            )
        if self.space == "factors" and self.method == "sequential":
            raise UsageError(
                "method sequential has no form on factors",
                hint="`linear` is PEFT's sum of factors; `sequential` sums the deltas",
            )

    def _check_density(self) -> None:
        if self.prunes and self.density is None:
            raise UsageError(
                f"method {self.method} needs a density",
                hint="the share of each delta that is kept: --density 0.2 is what the TIES paper "
                "uses, 0.5 is milder",
            )
        if self.density is not None and not (self.prunes and 0 < self.density <= 1):
            raise UsageError(
                f"density {self.density:g} with method {self.method}",
                hint=f"a number above 0 and up to 1, with one of the methods that prune: "
                f"{', '.join(PRUNING)} and their _svd forms",
            )

    @property
    def rule(self) -> str:
        """The method without its truncation: what happens to the deltas themselves."""
        return self.method.removesuffix("_svd") if self.prunes else "linear"

    @property
    def prunes(self) -> bool:
        """Say whether parts of the deltas are left out."""
        return self.method.removesuffix("_svd") in PRUNING

    @property
    def random(self) -> bool:
        """Say whether the seed matters."""
        return self.method.startswith("dare")

    @property
    def truncates(self) -> bool:
        """Say whether the result has a bounded rank."""
        return self.method in TRUNCATING

    @property
    def sums(self) -> bool:
        """Say whether it is the plain weighted sum of the deltas, which is merged exactly."""
        return self.method in SUMS and self.space == "delta"

    @property
    def needs_deltas(self) -> bool:
        """Say whether whole deltas must be held, one per adapter."""
        return self.prunes and (self.space == "delta" or self.truncates)

    def describe(self) -> str:
        """Return one line for a report."""
        parts = [self.method]
        parts += [f"density {self.density:g}"] if self.density is not None else []
        parts += [f"rank {self.rank}"] if self.rank is not None else []
        parts += [f"seed {self.seed}"] if self.random else []
        parts += ["on factors"] if self.space == "factors" else []
        return ", ".join(parts)
