"""Scale a layer's inputs before they are rounded, as AWQ does (arXiv 2306.00978, section 3.2).

A matrix's columns are multiplied by factors, and what makes its inputs is divided by them: a norm,
or the rows of the matrix before. Factors are `m^r / w^(1-r)`, with m the mean magnitude of an
input, w that of its weights relative to their group, and the r of least error.

What may be scaled is found by running the layer, not by a table per architecture. Matrices that get
the same tensor form a group; a norm is scaled if only such groups get its output. A norm that
multiplies by one plus its weight shows it when its weight is zero. Afterwards the layer runs again
and must compute the same, else it stays unscaled. AutoAWQ's lists, one class per architecture, are
where its known errors are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from weightsmith.forward.threads import product
from weightsmith.quantizers.layerwise.integers import best_grid
from weightsmith.quantizers.layerwise.observing import Moments, SharedInputGroup

_COARSE = (0.1, 0.3, 0.5, 0.7, 0.9)
_FINE = (-0.1, -0.05, 0.05, 0.1)
"""Ratios that are tried: coarsely, then around the best."""
_BEFORE = {"down_proj": "up_proj", "o_proj": "v_proj"}
"""A matrix -> the one whose outputs are its inputs, but for factors."""
_ROWS = 512
"""Outputs rounded at a time, so that they fit a CPU's cache."""


def best_factors(
    weights: Sequence[torch.Tensor], moments: Moments, size: int
) -> torch.Tensor | None:
    """Return the factors [inputs] with the least squared error of the outputs; None: change none.

    weights [outputs, inputs] share their inputs, of which `size` share a scale.
    """
    sizes = _relative_sizes(weights, size)
    mean = moments.magnitude / max(1, moments.tokens)
    ratios = [0.0, *_COARSE]
    tried = {0.0: _error(weights, moments, size, None)}
    for ratio in _COARSE:
        tried[ratio] = _error(weights, moments, size, factors_of(mean, sizes, ratio))
    best = min(ratios, key=tried.__getitem__)
    if best:
        for ratio in (round(best + step, 2) for step in _FINE):
            tried[ratio] = _error(weights, moments, size, factors_of(mean, sizes, ratio))
    best = min(tried, key=tried.__getitem__)
    return factors_of(mean, sizes, best) if best else None


def factors_of(mean: torch.Tensor, sizes: torch.Tensor, ratio: float) -> torch.Tensor:
    """Return AutoAWQ's factors [inputs] for a ratio (quantize/quantizer.py of 0.2.9)."""
    found = (mean**ratio / (sizes ** (1 - ratio) + 1e-4)).clamp_(min=1e-4)
    found /= (found.max() * found.min()).sqrt()
    return torch.where(torch.isfinite(found), found, 1.0)


def _relative_sizes(weights: Sequence[torch.Tensor], size: int) -> torch.Tensor:
    """Return each input's mean |weight|, relative to the largest of its group."""
    total = torch.zeros(weights[0].shape[1])
    for weight in weights:
        parts = weight.abs().reshape(len(weight), -1, size)
        total += (parts / (parts.amax(-1, keepdim=True) + 1e-6)).reshape(weight.shape).sum(0)
    return total / sum(len(weight) for weight in weights)


def _error(
    weights: Sequence[torch.Tensor], moments: Moments, size: int, factors: torch.Tensor | None
) -> float:
    """Return the squared error of the outputs if the scaled weights are rounded."""
    error = 0.0
    for weight in weights:
        for start in range(0, len(weight), _ROWS):
            own = weight[start : start + _ROWS]
            rows = own if factors is None else own * factors
            moved = best_grid(rows, None, size, symmetric=False).rounded(rows)
            if factors is not None:
                moved /= factors
            moved -= own
            error += float(product(moments.sketch, moved).square_().sum())
    return error


def scale_layer(
    groups: Sequence[SharedInputGroup], size: int, dtypes: Callable[[Any], torch.dtype]
) -> Iterator[Any]:
    """Scale a layer's groups in place where that helps; yield the norms and biases it changed.

    `dtypes` returns the dtype in which a module's vectors are stored.
    """
    by_name = {name: module for group in groups for name, module in group.linears.items()}
    for group in groups:
        before = _before(group, by_name)
        if group.norm is None and before is None:
            continue
        factors = best_factors([m.weight for m in group.linears.values()], group.moments, size)
        if factors is None:
            continue
        if before is None:
            factors = _divide_norm(group.norm, factors, dtypes(group.norm))
        else:
            before.weight.data = before.weight / factors[:, None]
            if before.bias is not None:
                before.bias.data = (before.bias / factors).to(dtypes(before)).float()
        for module in group.linears.values():
            module.weight.data = module.weight * factors
        group.moments.scale(factors)
        yield before or group.norm


def _before(group: SharedInputGroup, by_name: dict[str, Any]) -> Any:
    """Return the matrix whose outputs are a group's only inputs, or None."""
    if len(group.linears) > 1:
        return None
    (name,) = group.linears
    parent, _, last = name.rpartition(".")
    found = by_name.get(f"{parent}.{_BEFORE.get(last, '')}")
    fits = found is not None and found.out_features == group.linears[name].in_features
    return found if fits else None


def _divide_norm(norm: Any, factors: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Divide what a norm multiplies by; return the factors that undo its rounding exactly."""
    shift = _shift(norm)
    old = norm.weight + shift
    new = ((old / factors) - shift).to(dtype).float()
    norm.weight.data = new
    exact = old / (new + shift)
    usable = torch.isfinite(exact) & (exact > 0)
    return torch.where(usable, exact, factors)


def _shift(norm: Any) -> float:
    """Return 1 for a norm that multiplies by one plus its weight, else 0."""
    kept = norm.weight.data
    norm.weight.data = torch.zeros_like(kept)
    made = norm(torch.ones(1, 1, len(kept)))
    norm.weight.data = kept
    return 1.0 if bool(made.any()) else 0.0
