"""Method and parameters for combining adapters, checked before any work; no torch here."""

from __future__ import annotations

from dataclasses import dataclass, fields

from weightsmith.core.errors import UsageError
from weightsmith.core.merge_options import Merge

SUMS = ("sequential", "linear", "cat")
"""Methods that are the weighted sum of the deltas."""
PRUNING = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
TRUNCATING = ("svd", *(f"{method}_svd" for method in PRUNING))
KEEPABLE = ("sequential", "linear", "cat", *TRUNCATING)
"""Methods whose result is an adapter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Combination(Merge):
    """Options of a merge that fit together; raises UsageError for those that do not."""

    @classmethod
    def of(cls, options: Merge) -> Combination:
        """Return a merge's options, checked."""
        return cls(**{each.name: getattr(options, each.name) for each in fields(cls)})

    def __post_init__(self) -> None:
        """Refuse parameters that would be ignored or guessed."""
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
