"""Compare each element of a merged tensor with W + Σ s·B·A, rounded once, or with a mixture.

Merges that are not a plain sum are of pruned deltas (TIES, DARE, pruning), or of bounded rank.
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
from weightsmith.validating.result import ERROR, Finding, finding

PRECISION = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24}
"""Significand bits, including the implicit one."""
_MIN_EXPONENT = {torch.bfloat16: -126, torch.float16: -14, torch.float32: -126}
ARITHMETIC = 2.0**-20
"""Relative error allowed for a float32 sum of a few hundred products."""
_RECOMPUTED_PART = 0.02
"""If more than this part of a block looks wrong, it is not recomputed in float64."""
MOST_ADAPTERS = 6
TRUNCATION = 4 * ARITHMETIC
"""Relative error allowed for a truncated sum whose factors are rounded to float32."""
_ENOUGH = 64
"""Elements needed to show that an adapter is left out; fewer may be chance."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Factors:
    """The adapters' delta of a stored matrix: left · diag(scalings) · right."""

    left: torch.Tensor
    """(rows, ranks), float32."""
    right: torch.Tensor
    """(ranks, columns), float32."""
    scalings: torch.Tensor
    """(ranks), float64: each adapter's scaling times its weight."""

    def rows(self, first: int, count: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return rows of the summed delta, computed in float32 or float64."""
        left = self.left[first : first + count].to(dtype) * self.scalings.to(dtype)
        return left @ self.right.to(dtype)

    def exactly(self, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """Return single elements of the delta in float64."""
        left, right = self.left[rows].double(), self.right[:, columns].double()
        return (left * self.scalings * right.T).sum(1)


@dataclass(slots=True, kw_only=True)
class TensorComparison:
    """Comparison results of one tensor, collected block by block."""

    tensor: str
    total: int = 0
    wrong: int = 0
    row: int = -1
    column: int = -1
    found: float = 0.0
    expected: float = 0.0
    """Position and values of the first wrong element."""
    changed: bool = False
    """Whether an adapter changes the tensor."""
    change: float = 0.0
    """Σ (W' - W)²; like the next two, over blocks with wrong elements only."""
    delta: float = 0.0
    """Σ delta²."""
    along: float = 0.0
    """Σ (W' - W) · delta."""

    def times(self) -> float:
        """Return how many times the delta was added, by least squares; 0 without a delta."""
        return self.along / self.delta if self.delta else 0.0

    def cosine(self) -> float:
        """Return the cosine between the actual change and the delta."""
        size = (self.change * self.delta) ** 0.5
        return self.along / size if size else 0.0


def compare_rows(
    tally: TensorComparison,
    first: int,
    base: torch.Tensor,
    delta: torch.Tensor,
    merged: torch.Tensor,
    factors: Factors | None = None,
    slack: float = ARITHMETIC,
) -> None:
    """Count the elements of `merged` that are not base + delta rounded to its type.

    The tolerance is half a unit in the last place plus `slack` times the terms' magnitude. With
    `factors`, elements outside it are recomputed in float64. Without, the tolerance also includes
    the row's largest delta, because the delta's own terms may have cancelled.
    """
    expected, found = base + delta, merged.to(delta.dtype)
    tally.total += found.numel()
    tally.changed = tally.changed or bool(delta.any())
    off = (found - expected).abs_()
    # Below a power of two the spacing halves, so the smaller number decides.
    smaller = torch.minimum(found.abs(), expected.abs())
    suspect = ~(off <= half_step(smaller, merged.dtype))
    if not torch.isfinite(off.sum()):
        # The step at infinity is infinite, so infinity would pass.
        suspect |= ~torch.isfinite(found)
    if not suspect.any():
        return
    rows, columns = _positions(suspect)
    left, right = base.flatten(1)[rows, columns].double(), found.flatten(1)[rows, columns].double()
    exact = expected.flatten(1)[rows, columns].double()
    if factors is not None and len(rows) <= max(64, _RECOMPUTED_PART * suspect.numel()):
        exact = left + factors.exactly(rows + first, columns)
    into = left.abs() + (exact - left).abs()
    if factors is None:
        into += delta.flatten(1).abs().amax(1).double()[rows]
    smaller = torch.minimum(right.abs(), exact.abs())
    room = half_step(smaller, merged.dtype) + slack * into
    bad = ~((right - exact).abs() <= room) | ~torch.isfinite(right)
    if bad.any():
        place = int(bad.nonzero()[0])
        if not tally.wrong:
            tally.row, tally.column = int(rows[place]) + first, int(columns[place])
            tally.found, tally.expected = float(right[place]), float(exact[place])
        tally.wrong += int(bad.sum())
        change = found - base
        tally.change += float(change.double().square().sum())
        tally.delta += float(delta.double().square().sum())
        tally.along += float((change.double() * delta).sum())


def compare_bytes(
    tally: TensorComparison, first: int, base: torch.Tensor, merged: torch.Tensor
) -> None:
    """Count the elements of an unchanged tensor that differ from the base's, cast to its type."""
    expected = base.to(merged.dtype)
    tally.total += merged.numel()
    if torch.equal(_bits(expected), _bits(merged)):
        return
    bad = _bits(expected) != _bits(merged)
    rows, columns = _positions(bad)
    if not tally.wrong and len(rows):
        tally.row, tally.column = int(rows[0]) + first, int(columns[0])
        tally.found = float(merged.reshape(len(merged), -1)[rows[0], columns[0]])
        tally.expected = float(expected.reshape(len(expected), -1)[rows[0], columns[0]])
    tally.wrong += len(rows)


def half_step(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return half a unit in the last place of `dtype` at these float32 or float64 values."""
    if values.dtype == torch.float64:
        power = torch.ldexp(torch.ones_like(values), torch.frexp(values).exponent - 1)
    else:
        power = (values.view(torch.int32) & 0x7F800000).view(torch.float32)
    return power.clamp_min(2.0 ** _MIN_EXPONENT[dtype]) * 2.0 ** -PRECISION[dtype]


def _positions(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows and flat columns of the true elements; a vector has rows of one column."""
    places = mask.reshape(len(mask), -1).nonzero()
    return places[:, 0], places[:, 1]


def _bits(values: torch.Tensor) -> torch.Tensor:
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return values.contiguous().view(kinds[values.element_size()])


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
    if not kept.inside:
        kept.inside, kept.outside, kept.perhaps = ([0] * len(deltas) for _ in range(3))
    for number in range(len(deltas)):
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
