"""Merges that are no plain sum: of parts of each delta (TIES, DARE, pruning), or of bounded rank.

The first are judged without knowing which parts. At each element such a merge is the base and what
some of the adapters add there, by the methods' definitions (Yadav et al., "TIES-Merging", 2023; Yu
et al., "Language Models are Super Mario", 2023). So each element must be one of 2^n numbers for n
adapters, whatever was drawn or elected, and every adapter must be somewhere in each tensor that it
changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from weightsmith.validating.elements import ARITHMETIC, Factors, Tally, half_step
from weightsmith.validating.findings import ERROR, Finding, finding

MOST_ADAPTERS = 6
TRUNCATION = 4 * ARITHMETIC
"""What the factors of a truncated sum, rounded to float32, may be off, as a part of the values."""
_ENOUGH = 64
"""Elements that show that an adapter is left out; fewer may be chance."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """What a method does with the deltas that it keeps at an element, or with their sum."""

    gain: float = 1.0
    """What kept deltas are multiplied by: DARE divides them by their density."""
    mean: bool = False
    """They are averaged, not summed."""
    truncates: bool = False
    """All are kept, and of their sum the largest singular values."""
    rank: int | None = None
    """How many of those; the largest of the adapters' ranks by default."""

    def judges(self, parts: Sequence[Factors]) -> bool:
        """Say whether what these adapters' parts became can be judged."""
        return self.truncates or 0 < len(parts) <= MOST_ADAPTERS


@dataclass(slots=True)
class Kept:
    """Of each adapter, at how many elements of a tensor it must be in the sum, or cannot be."""

    inside: list[int] = field(default_factory=list)
    outside: list[int] = field(default_factory=list)

    def missing(self) -> list[int]:
        """Return the numbers of adapters that are nowhere in the tensor."""
        both = enumerate(zip(self.inside, self.outside, strict=True))
        return [number for number, (there, away) in both if not there and away >= _ENOUGH]


def compare_kept(
    tally: Tally,
    kept: Kept,
    mixture: Mixture,
    first: int,
    base: torch.Tensor,
    deltas: Sequence[torch.Tensor],
    merged: torch.Tensor,
) -> None:
    """Count the elements of `merged` that no choice of the (weighted) deltas explains.

    Half a unit in the last place of its type is allowed, and what float32 sums are off by.
    """
    found = merged.to(base.dtype)
    slack = ARITHMETIC * (base.abs() + mixture.gain * sum(delta.abs() for delta in deltas))
    can = [torch.zeros_like(found, dtype=torch.bool) for _ in deltas]
    need_not = [part.clone() for part in can]
    nearest = torch.full_like(found, torch.inf)
    wanted = base.clone()
    for choice in range(1 << len(deltas)):
        members = [number for number in range(len(deltas)) if choice >> number & 1]
        scale = mixture.gain / (len(members) if mixture.mean and members else 1)
        total = base + scale * sum(deltas[number] for number in members) if members else base
        off = (found - total).abs()
        smaller = torch.minimum(found.abs(), total.abs())
        fits = off <= half_step(smaller, merged.dtype) + slack
        for number in range(len(deltas)):
            (can if number in members else need_not)[number].logical_or_(fits)
        closer = off < nearest
        nearest, wanted = torch.where(closer, off, nearest), torch.where(closer, total, wanted)
    explained = can[0] | need_not[0]
    tally.total += found.numel()
    tally.changed = True
    for number in range(len(deltas)):
        if len(kept.inside) <= number:
            kept.inside.append(0)
            kept.outside.append(0)
        kept.inside[number] += int((can[number] & ~need_not[number]).sum())
        kept.outside[number] += int((need_not[number] & ~can[number]).sum())
    bad = (~explained | ~torch.isfinite(found)).nonzero()
    if len(bad) and not tally.wrong:
        row, column = (int(part) for part in bad[0])
        tally.row, tally.column = row + first, column
        tally.found, tally.wanted = float(found[row, column]), float(wanted[row, column])
    tally.wrong += len(bad)


def truncated(parts: Sequence[Factors], whole: Factors, rank: int | None) -> Factors:
    """Return the best approximation of bounded rank to the sum of all parts (Eckart and Young).

    From thin QRs of both factors, in float64; the singular values are the scalings.
    """
    q1, r1 = torch.linalg.qr(whole.left.double() * whole.scalings)
    q2, r2 = torch.linalg.qr(whole.right.double().T)
    u, values, v = torch.linalg.svd(r1 @ r2.T)
    kept = rank or max(len(part.right) for part in parts)
    return Factors(
        left=(q1 @ u[:, :kept]).float(),
        right=(v[:kept] @ q2.T).float(),
        scalings=values[:kept],
    )


def left_out(kept: dict[str, Kept], tensors: dict[str, str]) -> list[Finding]:
    """Return a finding for each tensor that an adapter changes and that has nothing of it."""
    return [
        finding(
            ERROR,
            "elements",
            f"{tensors[name]}: adapter number {number + 1} is nowhere in it",
            tensors[name],
        )
        for name, each in kept.items()
        for number in each.missing()
    ]
