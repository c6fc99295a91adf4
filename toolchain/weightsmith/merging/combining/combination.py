"""Method and parameters for combining adapters, checked before any work; no torch here."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from weightsmith.errors import UsageError

SUMS = ("sequential", "linear", "cat")
"""Methods that are the weighted sum of the deltas."""
PRUNING = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
TRUNCATING = ("svd", *(f"{method}_svd" for method in PRUNING))
METHODS = (*SUMS, "svd", *PRUNING, *TRUNCATING[1:])
SPACES = ("delta", "factors")
KEEPABLE = ("sequential", "linear", "cat", *TRUNCATING)
"""Methods whose result is an adapter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Combination:
    """A method and its parameters; raises UsageError for invalid combinations."""

    method: str = "sequential"
    density: float | None = None
    """Fraction of each delta that pruning keeps, in (0, 1]."""
    rank: int | None = None
    """Rank of a truncated result; default: the largest rank of the inputs."""
    seed: int = 0
    """Seed of DARE's masks."""
    space: str = "delta"
    """`delta`: methods act on B·A; `factors`: on A and B separately, as PEFT does."""

    @classmethod
    def of(cls, options: Any) -> Combination:
        """Return a merge's options for combining adapters."""
        return cls(**{field.name: getattr(options, field.name) for field in fields(cls)})

    def __post_init__(self) -> None:
        """Refuse parameters that would be ignored or guessed."""
        if self.method not in METHODS:
            raise UsageError(
                f"unknown merge method {self.method!r}", hint=f"one of {', '.join(METHODS)}"
            )
        if self.space not in SPACES:
            raise UsageError(f"unknown space {self.space!r}", hint=f"one of {', '.join(SPACES)}")
        self._check_density()
        if self.rank is not None and (self.method not in TRUNCATING or self.rank < 1):
            raise UsageError(
                f"invalid rank {self.rank} for method {self.method}",
                hint=f"give a positive rank, with one of {', '.join(TRUNCATING)}",
            )
        if self.seed < 0 or (self.seed and not self.random):
            raise UsageError(
                f"invalid seed {self.seed} for method {self.method}",
                hint="give a seed of 0 or more, with one of the dare methods: the other methods "
                "are not random",
            )
        if self.space == "factors" and self.method == "sequential":
            raise UsageError(
                "method sequential does not work on factors",
                hint="use `linear`, PEFT's sum of factors; `sequential` sums deltas",
            )

    def _check_density(self) -> None:
        if self.prunes and self.density is None:
            raise UsageError(
                f"method {self.method} needs a density",
                hint="give the fraction of each delta to keep: --density 0.2 as in the TIES "
                "paper, or 0.5 to prune less",
            )
        if self.density is not None and not (self.prunes and 0 < self.density <= 1):
            raise UsageError(
                f"invalid density {self.density:g} for method {self.method}",
                hint=f"give a number above 0 and up to 1, with a method that prunes: "
                f"{', '.join(PRUNING)} or their _svd variants",
            )

    @property
    def rule(self) -> str:
        """The method without truncation: `ties` for `ties_svd`."""
        return self.method.removesuffix("_svd") if self.prunes else "linear"

    @property
    def prunes(self) -> bool:
        """Return whether the method prunes the deltas."""
        return self.method.removesuffix("_svd") in PRUNING

    @property
    def random(self) -> bool:
        """Return whether the method depends on the seed."""
        return self.method.startswith("dare")

    @property
    def truncates(self) -> bool:
        """Return whether the result has a bounded rank."""
        return self.method in TRUNCATING

    @property
    def sums(self) -> bool:
        """Return whether it is the plain weighted sum of deltas, which is merged exactly."""
        return self.method in SUMS and self.space == "delta"

    @property
    def needs_deltas(self) -> bool:
        """Return whether it needs the whole delta of each adapter in memory."""
        return self.prunes and (self.space == "delta" or self.truncates)

    def describe(self) -> str:
        """Return a one-line description."""
        parts = [self.method]
        parts += [f"density {self.density:g}"] if self.density is not None else []
        parts += [f"rank {self.rank}"] if self.rank is not None else []
        parts += [f"seed {self.seed}"] if self.random else []
        parts += ["on factors"] if self.space == "factors" else []
        return ", ".join(parts)
