"""Leaves positions of a batch that nothing depends on out of its products with matrices."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

_here = threading.local()


@dataclass(slots=True)
class BatchPositions:
    """Positions of a batch, numbered row by row, and which of them a model is asked for."""

    rows: int
    columns: int
    tokens: torch.Tensor
    """Those with a token; the others are padding."""
    wanted: torch.Tensor
    """Those that get logits."""

    def narrow(self) -> None:
        """Leave out all but those that get logits: no later position looks at others any more."""
        self.tokens = self.wanted


@contextmanager
def only(positions: BatchPositions) -> Iterator[None]:
    """Multiply only these positions, in this thread."""
    _here.positions = positions
    try:
        yield
    finally:
        _here.positions = None


def multiplied(
    inputs: torch.Tensor, multiply: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Return the product of inputs [..., columns]; zeros where nothing depends on it."""
    known: BatchPositions | None = getattr(_here, "positions", None)
    if known is None or inputs.shape[:-1] != (known.rows, known.columns):
        return multiply(inputs)
    count = known.rows * known.columns
    if len(known.tokens) == count:
        return multiply(inputs)
    some = multiply(inputs.reshape(count, -1)[known.tokens])
    product = some.new_zeros((count, some.shape[-1]))
    product[known.tokens] = some
    return product.view(known.rows, known.columns, -1)
