"""Every element of a merged tensor against W + Σ s·B·A: it must be that number, rounded once."""

from __future__ import annotations

from dataclasses import dataclass

import torch

PRECISION = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24}
"""Bits of the significand, the implicit one included."""
_LEAST = {torch.bfloat16: -126, torch.float16: -14, torch.float32: -126}
ARITHMETIC = 2.0**-20
"""What a float32 sum of a few hundred products may be off, as a part of what goes into it."""
_CAREFUL_PART = 0.02
"""Where more of a block looks wrong than this, it is wrong: no need to look closer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Factors:
    """What adapters add to a matrix as the base stores it: left · diagonal of scalings · right."""

    left: torch.Tensor
    """(rows, ranks), float32."""
    right: torch.Tensor
    """(ranks, columns), float32."""
    scalings: torch.Tensor
    """(ranks), float64: each adapter's own, times its weight."""

    def rows(self, first: int, count: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return rows of the sum of all deltas, computed in float32 or float64."""
        left = self.left[first : first + count].to(dtype) * self.scalings.to(dtype)
        return left @ self.right.to(dtype)

    def exactly(self, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """Return single elements of the delta in float64."""
        left, right = self.left[rows].double(), self.right[:, columns].double()
        return (left * self.scalings * right.T).sum(1)


@dataclass(slots=True, kw_only=True)
class Tally:
    """What was seen of one tensor, block by block."""

    tensor: str
    total: int = 0
    wrong: int = 0
    row: int = -1
    column: int = -1
    found: float = 0.0
    wanted: float = 0.0
    """Place and values of the first wrong element."""
    changed: bool = False
    """An adapter adds something here."""
    change: float = 0.0
    """Σ (W' - W)², as the next two over blocks with wrong elements."""
    delta: float = 0.0
    """Σ delta²."""
    along: float = 0.0
    """Σ (W' - W) · delta."""

    def times(self) -> float:
        """Return how often the delta is in the tensor, by least squares; 0 without a delta."""
        return self.along / self.delta if self.delta else 0.0

    def likeness(self) -> float:
        """Return the cosine between what was added and what should have been."""
        size = (self.change * self.delta) ** 0.5
        return self.along / size if size else 0.0


def compare_rows(
    tally: Tally,
    first: int,
    base: torch.Tensor,
    delta: torch.Tensor,
    merged: torch.Tensor,
    factors: Factors | None = None,
    slack: float = ARITHMETIC,
) -> None:
    """Count the elements of `merged` that are not base + delta rounded to its type.

    Half a unit in the last place is allowed, and `slack` of what goes into the sum; what then
    looks wrong is summed again in float64, where factors are given. Without them a delta may be
    off by a part of the row's largest, since its own terms may have cancelled.
    """
    wanted, found = base + delta, merged.to(delta.dtype)
    tally.total += found.numel()
    tally.changed = tally.changed or bool(delta.any())
    off = (found - wanted).abs_()
    # Below a power of two the steps are half as wide: the smaller of the two numbers tells.
    smaller = torch.minimum(found.abs(), wanted.abs())
    suspect = ~(off <= half_step(smaller, merged.dtype))
    if not torch.isfinite(off.sum()):
        # Infinity has an infinite step, within which it would pass.
        suspect |= ~torch.isfinite(found)
    if not suspect.any():
        return
    rows, columns = _places(suspect)
    left, right = base.flatten(1)[rows, columns].double(), found.flatten(1)[rows, columns].double()
    exact = wanted.flatten(1)[rows, columns].double()
    if factors is not None and len(rows) <= max(64, _CAREFUL_PART * suspect.numel()):
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
            tally.found, tally.wanted = float(right[place]), float(exact[place])
        tally.wrong += int(bad.sum())
        change = found - base
        tally.change += float(change.double().square().sum())
        tally.delta += float(delta.double().square().sum())
        tally.along += float((change.double() * delta).sum())


def compare_bytes(tally: Tally, first: int, base: torch.Tensor, merged: torch.Tensor) -> None:
    """Count the elements of an untouched tensor that are not the base's, cast to its type."""
    wanted = base.to(merged.dtype)
    tally.total += merged.numel()
    if torch.equal(_bits(wanted), _bits(merged)):
        return
    bad = _bits(wanted) != _bits(merged)
    rows, columns = _places(bad)
    if not tally.wrong and len(rows):
        tally.row, tally.column = int(rows[0]) + first, int(columns[0])
        tally.found = float(merged.reshape(len(merged), -1)[rows[0], columns[0]])
        tally.wanted = float(wanted.reshape(len(wanted), -1)[rows[0], columns[0]])
    tally.wrong += len(rows)


def half_step(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return half a unit in the last place that `dtype` has at these float32 or float64 values."""
    if values.dtype == torch.float64:
        power = torch.ldexp(torch.ones_like(values), torch.frexp(values).exponent - 1)
    else:
        power = (values.view(torch.int32) & 0x7F800000).view(torch.float32)
    return power.clamp_min(2.0 ** _LEAST[dtype]) * 2.0 ** -PRECISION[dtype]


def _places(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows and flat columns of what is true, a vector counting as rows of one column."""
    places = mask.reshape(len(mask), -1).nonzero()
    return places[:, 0], places[:, 1]


def _bits(values: torch.Tensor) -> torch.Tensor:
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return values.contiguous().view(kinds[values.element_size()])
