"""A layer of the base that one of PEFT's tuners changes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseLayer:
    """A layer of the base that an adapter changes."""

    module: str
    """Its path in the model, which patterns in the configuration match."""
    kind: str
    """`linear`, `embedding`, `conv1d` (GPT-2's, which stores (in, out)), `conv` or `norm`."""
    shape: tuple[int, ...]
    """Shape of the base's weight."""
    bias: bool
