"""A layer of the base that one of PEFT's tuners changes, as a value."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """A layer of the base that an adapter changes."""

    module: str
    """Its path in the model, which patterns in the configuration may speak about."""
    kind: str
    """`linear`, `embedding`, `conv1d` (GPT-2's, which stores (in, out)), `conv` or `norm`."""
    shape: tuple[int, ...]
    """Of the base's weight."""
    bias: bool
