"""Merges that are not a plain sum: of pruned deltas (TIES, DARE, pruning), or of bounded rank.

Pruned merges are checked without knowing which elements were kept. By the methods' definitions
(Yadav et al., "TIES-Merging", 2023; Yu et al., "Language Models are Super Mario", 2023), each
element is the base plus the deltas of some of the adapters. So with n adapters each element must
be one of 2^n numbers, and every adapter must occur somewhere in each tensor that it changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import permutations

import torch

from weightsmith.core.jobs import CombinationRule
from weightsmith.validating.elements import ARITHMETIC, Factors, TensorComparison, half_step
from weightsmith.validating.findings import ERROR, Finding, finding

MOST_ADAPTERS = 6
TRUNCATION = 4 * ARITHMETIC
"""Relative error allowed for a truncated sum whose factors are rounded to float32."""
_ENOUGH = 64
"""Elements needed to show that an adapter is left out; fewer may be chance."""


def can_judge(mixture: CombinationRule, parts: Sequence[Factors]) -> bool:
    """Return whether a merge of these adapters' deltas can be checked."""
    return mixture.truncates or 0 < len(parts) <= MOST_ADAPTERS


@dataclass(slots=True)
class MaskCounts:
    """Per adapter, the number of elements of a tensor that must, or cannot, contain it."""

    inside: list[int] = field(default_factory=list)
    outside: list[int] = field(default_factory=list)
    apart: set[tuple[int, int]] = field(default_factory=set)
    """Pairs of adapters whose deltas differ; of equal ones, either may be the one that is there."""
    perhaps: list[int] = field(default_factory=list)
    """Per adapter, the number of elements that may contain it and are not the base's."""

    def missing(self) -> list[int]:
        """Return the indices of adapters that the tensor does not contain."""
        both = enumerate(zip(self.inside, self.outside, strict=True))
        absent = [number for number, (there, away) in both if not there and away >= _ENOUGH]
        others = set(range(len(self.inside)))
        return [
            number
            for number in absent
            if not self.perhaps[number]
            or all((number, other) in self.apart for other in others - {number})
        ]

    def tell_apart(self, deltas: Sequence[torch.Tensor], slack: torch.Tensor) -> None:
        """Note which of the deltas differ by more than the slack anywhere."""
        for pair in permutations(range(len(deltas)), 2):
            one, other = (deltas[number] for number in pair)
            if pair not in self.apart and bool(((one - other).abs() > slack).any()):
                self.apart.add(pair)


def compare_kept(
    tally: TensorComparison,
    kept: MaskCounts,
    mixture: CombinationRule,
    first: int,
    base: torch.Tensor,
    deltas: Sequence[torch.Tensor],
    merged: torch.Tensor,
) -> None:
    """Count the elements of `merged` that no subset of the (weighted) deltas explains.

    The tolerance is half a unit in the last place plus the error of float32 sums.
    """
    found = merged.to(base.dtype)
    slack = ARITHMETIC * (base.abs() + mixture.gain * sum(delta.abs() for delta in deltas))
    can = [torch.zeros_like(found, dtype=torch.bool) for _ in deltas]
    need_not = [part.clone() for part in can]
    unchanged, nearest = can[0], torch.full_like(found, torch.inf)
    expected = base.clone()
    for choice in range(1 << len(deltas)):
        members = [number for number in range(len(deltas)) if choice >> number & 1]
        scale = mixture.gain / (len(members) if mixture.mean and members else 1)
        total = base + scale * sum(deltas[number] for number in members) if members else base
        off = (found - total).abs()
        smaller = torch.minimum(found.abs(), total.abs())
        fits = off <= half_step(smaller, merged.dtype) + slack
        unchanged = fits if not members else unchanged
        for number in range(len(deltas)):
            (can if number in members else need_not)[number].logical_or_(fits)
        closer = off < nearest
        nearest, expected = torch.where(closer, off, nearest), torch.where(closer, total, expected)
    kept.tell_apart(deltas, slack)
    explained = can[0] | need_not[0]
    tally.total += found.numel()
    tally.changed = True
    for number in range(len(deltas)):
        if len(kept.inside) <= number:
            kept.inside.append(0)
            kept.outside.append(0)
            kept.perhaps.append(0)
        kept.inside[number] += int((can[number] & ~need_not[number]).sum())
        kept.outside[number] += int((need_not[number] & ~can[number]).sum())
        kept.perhaps[number] += int((can[number] & ~unchanged).sum())
    bad = (~explained | ~torch.isfinite(found)).nonzero()
    if len(bad) and not tally.wrong:
        row, column = (int(part) for part in bad[0])
        tally.row, tally.column = row + first, column
        tally.found, tally.expected = float(found[row, column]), float(expected[row, column])
    tally.wrong += len(bad)


def truncated(parts: Sequence[Factors], whole: Factors, rank: int | None) -> Factors:
    """Return the best low-rank approximation of the sum of all parts (Eckart and Young).

    Computed in float64 from thin QRs of both factors; the scalings are the singular values.
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


def left_out(kept: dict[str, MaskCounts], tensors: dict[str, str]) -> list[Finding]:
    """Return a finding for each tensor that lacks the delta of one of its adapters."""
    return [
        finding(
            ERROR,
            "elements",
            f"{tensors[name]}: adapter {number + 1} is missing",
            tensors[name],
        )
        for name, each in kept.items()
        for number in each.missing()
    ]
