"""Round a matrix one input at a time, and let the inputs that follow make up for the error.

GPTQ (arXiv 2210.17323, algorithm 1) with grids that are chosen beforehand and inputs in the order
of their power (`static_groups` and `desc_act` of its reference implementation), which needs no
other layout than rounding by itself.
"""

from __future__ import annotations

import torch

from weightsmith.quantizers.layerwise.integers import Grid

_BLOCK = 64
"""Inputs whose errors are spread to the rest at once."""
_DAMPING = 0.05
"""Of the mean power, added to each input's: with little text, errors must not be traded freely."""
_LARGEST = 15


def compensated(weight: torch.Tensor, gram: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Return values on the grid, float32 [outputs, inputs], for a weight of that shape.

    `gram` [inputs, inputs] is the inputs' Gram matrix.
    """
    order = torch.argsort(gram.diagonal(), descending=True, stable=True)
    upper = _upper(gram[order][:, order])
    size = weight.shape[1] // grid.scale.shape[1]
    groups = order // size
    # By inputs, so that those of a step are next to each other in memory.
    left = weight.T[order].contiguous()
    scales, zeros = grid.scale.T[groups], grid.zero.T[groups]
    made = torch.empty_like(left)
    for start in range(0, len(left), _BLOCK):
        stop = min(start + _BLOCK, len(left))
        part, errors = left[start:stop], torch.empty_like(left[start:stop])
        corner = upper[start:stop, start:stop]
        for i in range(stop - start):
            column, scale, zero = part[i], scales[start + i], zeros[start + i]
            value = (column / scale).round_().clamp_(min=-zero, max=_LARGEST - zero).mul_(scale)
            made[start + i] = value
            error = torch.sub(column, value, out=errors[i]).div_(corner[i, i])
            if i + 1 < stop - start:
                part[i + 1 :].addr_(corner[i, i + 1 :], error, alpha=-1)
        if stop < len(left):
            left[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    found = torch.empty_like(made)
    found[order] = made
    return found.T.contiguous()


def _upper(gram: torch.Tensor) -> torch.Tensor:
    """Return the upper Cholesky factor U of the damped Gram matrix's inverse, U^T U.

    It is the inverse of M with M M^T the matrix itself and M upper: the factor of the matrix in
    reverse order, reversed. So no inverse has to be factored.
    """
    damped = gram.double().flip(0, 1)
    power = damped.diagonal()
    power += _DAMPING * float(power.mean()) or 1.0
    reversed_ = torch.linalg.cholesky(damped).flip(0, 1)
    unit = torch.eye(len(gram), dtype=torch.float64)
    found: torch.Tensor = torch.linalg.solve_triangular(reversed_, unit, upper=True)
    return found.float()
