"""Four-bit integers in groups of inputs: their scales and zero points, and two layouts of them.

AutoAWQ's GEMM layout (awq/modules/linear/gemm.py of AutoAWQ 0.2.9) and GPTQ's first layout
(qlinear/torch.py of GPTQModel 7.6), the ones that `packed.py` reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

_LARGEST = 15
_MIDDLE = 8
"""The zero point of a symmetric grid."""
_LEAST = 2.0**-14
"""The least scale that float16 holds with full precision."""
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Nibble of an int32 that holds column i (of eight)."""
_SHRINK, _STEPS = 20, 10
"""Ranges that are tried: the whole times 1 - step / shrink, as in AutoAWQ."""


@dataclass(frozen=True, slots=True)
class Grid:
    """Scales and zero points, float32 [outputs, groups]; value = (code - zero) * scale."""

    scale: torch.Tensor
    zero: torch.Tensor

    @classmethod
    def joined(cls, grids: Sequence[Grid]) -> Grid:
        """Return the grid of matrices that are joined along their outputs."""
        return cls(torch.cat([one.scale for one in grids]), torch.cat([one.zero for one in grids]))

    def rounded(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the nearest values to a weight [outputs, inputs]."""
        size = weight.shape[1] // self.scale.shape[1]
        parts = weight.reshape(len(weight), -1, size)
        return _nearest(parts, self.scale[:, :, None], self.zero[:, :, None]).reshape(weight.shape)

    def codes(self, values: torch.Tensor) -> torch.Tensor:
        """Return the codes, int32 [outputs, inputs], of values that are on the grid."""
        size = values.shape[1] // self.scale.shape[1]
        parts = values.reshape(len(values), -1, size)
        codes = torch.round(parts / self.scale[:, :, None]) + self.zero[:, :, None]
        return codes.clamp_(0, _LARGEST).reshape(values.shape).int()


def _nearest(parts: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """Return the nearest values on grids, in place of new ones."""
    made = (parts / scale).round_()
    made = torch.minimum(torch.maximum(made, -zero, out=made), _LARGEST - zero, out=made)
    return made.mul_(scale)


def _stored(scale: torch.Tensor) -> torch.Tensor:
    """Return scales that float16 and bfloat16 both hold, so that no engine rounds them again."""
    return scale.clamp(_LEAST, 60000.0).bfloat16().float()


def grid_of(low: torch.Tensor, high: torch.Tensor, *, symmetric: bool) -> Grid:
    """Return the grid for values from `low` <= 0 to `high` >= 0, both [outputs, groups]."""
    if symmetric:
        scale = _stored(torch.maximum(-low, high) * (2 / _LARGEST))
        return Grid(scale, torch.full_like(scale, _MIDDLE))
    scale = _stored((high - low) / _LARGEST)
    return Grid(scale, torch.round(-low / scale).clamp_(0, _LARGEST))


def best_grid(
    weight: torch.Tensor, gram: torch.Tensor | None, size: int, *, symmetric: bool
) -> Grid:
    """Return for each group of `size` inputs the grid with the least squared error of its output.

    weight [outputs, inputs]; `gram` [inputs, inputs] is the inputs' Gram matrix; None: use the
    whole range. The error of a group's output over all inputs is `d G d`, with d the change of its
    weights, as in `awq_search.py`. A range that wins is at least half the whole one.
    """
    parts = weight.reshape(len(weight), -1, size)
    low, high = parts.amin(-1).clamp_(max=0), parts.amax(-1).clamp_(min=0)
    best = grid_of(low, high, symmetric=symmetric)
    if gram is None:
        return best
    count = parts.shape[1]
    blocks = gram.reshape(count, size, count, size)[range(count), :, range(count)]
    own = parts.transpose(0, 1).contiguous()
    scale, zero = best.scale.clone(), best.zero.clone()
    least: torch.Tensor | None = None
    for step in range(_STEPS):
        part = 1 - step / _SHRINK
        tried = grid_of(low * part, high * part, symmetric=symmetric)
        moved = _nearest(own, tried.scale.T[:, :, None], tried.zero.T[:, :, None]).sub_(own)
        error = torch.bmm(moved, blocks).mul_(moved).sum(-1).T
        if least is None:
            least = error
            continue
        better = error < least
        least = torch.where(better, error, least)
        scale = torch.where(better, tried.scale, scale)
        zero = torch.where(better, tried.zero, zero)
    return Grid(scale, zero)


def packed_awq(grid: Grid, values: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return `qweight` [inputs, outputs / 8], `qzeros` and `scales` of values on a grid."""
    return {
        "qweight": _packed_columns(grid.codes(values).T, _AWQ_ORDER),
        "qzeros": _packed_columns(grid.zero.T, _AWQ_ORDER),
        "scales": grid.scale.T.half().contiguous(),
    }


def packed_gptq(grid: Grid, values: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return `qweight` [inputs / 8, outputs], `qzeros`, `scales`, `g_idx` of values on a grid."""
    count, order = values.shape[1], tuple(range(8))
    return {
        "qweight": _packed_columns(grid.codes(values), order).T.contiguous(),
        "qzeros": _packed_columns(grid.zero.T - 1, order),
        "scales": grid.scale.T.half().contiguous(),
        "g_idx": (torch.arange(count) // (count // grid.scale.shape[1])).int(),
    }


def _packed_columns(codes: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """Return int32 [rows, columns / 8]; column i of eight is in nibble order[i]."""
    shifts = torch.tensor([4 * place for place in order])
    words = (codes.reshape(len(codes), -1, 8).long() << shifts).sum(-1)
    return torch.where(words < 1 << 31, words, words - (1 << 32)).int()
