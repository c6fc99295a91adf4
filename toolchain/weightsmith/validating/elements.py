"""Compare each element of a merged tensor with W + Σ s·B·A, rounded once."""

from __future__ import annotations

from dataclasses import dataclass

import torch

PRECISION = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24}
"""Significand bits, including the implicit one."""
_MIN_EXPONENT = {torch.bfloat16: -126, torch.float16: -14, torch.float32: -126}
ARITHMETIC = 2.0**-20
"""Relative error allowed for a float32 sum of a few hundred products."""
_RECOMPUTED_PART = 0.02
"""If more than this part of a block looks wrong, it is not recomputed in float64."""


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
