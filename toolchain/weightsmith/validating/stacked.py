"""Check the experts that adapters change, one at a time."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from weightsmith.forward.experts import ExpertStack, LazyTensor, stacks_of
from weightsmith.forward.weights import BLOCK, Weights
from weightsmith.validating.elements import Factors, TensorComparison, compare_rows
from weightsmith.validating.sites import Site

if TYPE_CHECKING:
    from weightsmith.forward.products import Matrix


def compare_experts(
    site: Site, base: Weights, merged: Weights, tallies: MutableMapping[str, TensorComparison]
) -> None:
    """Compare all parameters of a module with experts; a tally's row is the expert's number."""
    stacks = stacks_of(site.layer)
    for part, name in site.parameters.items():
        tensor = merged.tensor_of(name) or name
        tally = tallies.setdefault(name, TensorComparison(tensor=tensor))
        if part in stacks:
            _compare_stack(tally, name, stacks[part], base, merged)
        else:
            values, found = base.whole(name), stored(merged, name)
            delta = torch.zeros_like(values)
            compare_rows(tally, 0, rows_of(values), rows_of(delta), rows_of(found))


def _compare_stack(
    tally: TensorComparison, name: str, stack: ExpertStack, base: Weights, merged: Weights
) -> None:
    base_experts, merged_experts = base.experts(name), merged.experts(name)
    whole = None if merged_experts else stored(merged, name)
    for number, reads in enumerate(base_experts):
        parts = [read() for read in reads]
        if whole is None:
            found = tuple(read() for read in merged_experts[number])
        else:
            found = torch.split(whole[number], [len(part) for part in parts])
        _compare_expert(tally, number, parts, found, _factors(stack, number))


def _compare_expert(
    tally: TensorComparison,
    number: int,
    base: Sequence[Matrix],
    merged: Sequence[Matrix],
    factors: Factors,
) -> None:
    start, columns = 0, factors.right.shape[1]
    step = max(1, BLOCK // columns)
    for before, after in zip(base, merged, strict=True):
        for first in range(0, len(before), step):
            rows, found = before[first : first + step], after[first : first + step]
            wide = torch.float64 if found.dtype == torch.float32 else torch.float32
            delta, known = factors.rows(start + first, len(rows), wide), tally.wrong
            compare_rows(tally, start + first, rows.to(wide), delta, found, factors)
            if tally.wrong and not known:
                tally.row, tally.column = number, tally.row * columns + tally.column
        start += len(before)


def _factors(stack: ExpertStack, number: int) -> Factors:
    """Return the sum of all adapters' deltas of one expert as one product."""
    _, rows, columns = stack.shape
    parts = stack.deltas(number)
    nothing = torch.zeros(rows, 0), torch.zeros(0, columns)
    scalings = [torch.full((len(right),), by, dtype=torch.float64) for _, right, by in parts]
    return Factors(
        left=torch.cat([nothing[0], *(left for left, _, _ in parts)], 1),
        right=torch.cat([nothing[1], *(right for _, right, _ in parts)]),
        scalings=torch.cat([torch.zeros(0, dtype=torch.float64), *scalings]),
    )


class RoundedStack(LazyTensor):
    """A stack, with adapters or without, whose experts are rounded to a type."""

    def __init__(self, stack: ExpertStack, kind: torch.dtype) -> None:
        """Round what is taken of `stack`; nothing is read before."""
        self._stack, self._kind, self.shape = stack, kind, stack.shape

    def __getitem__(self, index: int | slice | torch.Tensor) -> torch.Tensor:
        """Return what the stack has at the index, rounded, in float32."""
        found = self._stack[index]
        exact = found.whole() if isinstance(found, LazyTensor) else found
        return exact.to(self._kind).float()

    def whole(self) -> torch.Tensor:
        """Return all experts, rounded."""
        return self._stack.whole().to(self._kind).float()


@contextmanager
def rounded_experts(site: Site, merged: Weights) -> Iterator[None]:
    """Run a module with its experts rounded to the merged file's type while the block runs."""
    module, stacks = site.layer.get_base_layer(), stacks_of(site.layer)
    for part, stack in stacks.items():
        object.__setattr__(
            module, part, RoundedStack(stack, dtype_of(merged, site.parameters[part]))
        )
    try:
        yield
    finally:
        for part, stack in stacks.items():
            object.__setattr__(module, part, stack)


def dtype_of(weights: Weights, parameter: str) -> torch.dtype:
    """Return a parameter's dtype in the file."""
    return next(weights.blocks(weights.tensors_of(parameter)[0]))[1].dtype


def stored(weights: Weights, parameter: str) -> torch.Tensor:
    """Return a parameter in its dtype in the file."""
    tensor = weights.tensor_of(parameter)
    if tensor:
        return weights.read(tensor)
    return weights.whole(parameter).to(dtype_of(weights, parameter))


def rows_of(values: torch.Tensor) -> torch.Tensor:
    """Return a tensor as a matrix with its first dimension as rows."""
    return values.reshape(len(values), -1) if values.dim() else values.reshape(1, 1)
