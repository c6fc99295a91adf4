"""What a family of adapter weights is: it recognises its keys and says what they add, and where."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache

from toolchain.checkpoints.safetensors import TensorInfo
from toolchain.merging.adapter_config import AdapterConfig
from toolchain.merging.names import BaseNames


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """One low-rank addition to a base tensor: factor · B·A, or its transpose."""

    adapter: int
    """Which adapter, by its place in the request."""
    a: TensorInfo
    """(rank, in features)."""
    b: TensorInfo
    """(out features, rank)."""
    scaling: float
    """What the adapter's configuration says."""
    factor: float
    """weight · scaling, rounded once to float64: the exact number that the merge uses."""
    transposed: bool
    """True where the base stores (in, out), as GPT-2's Conv1D does."""

    @property
    def rank(self) -> int:
        """Columns of B, rows of A."""
        return self.a.shape[0]

    @property
    def delta_shape(self) -> tuple[int, int]:
        """Shape of the addition as the base stores it."""
        shape = (self.b.shape[0], self.a.shape[1])
        return (shape[1], shape[0]) if self.transposed else shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """Adapter keys that a family understood, the base tensor they change, and how."""

    keys: tuple[str, ...]
    module: str
    """The module's name in the model."""
    target: str
    """The base tensor's name."""
    term: Term


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterView:
    """What a family may look at: one adapter's keys and configuration, and the base's names."""

    index: int
    path: str
    weight: float
    keys: Mapping[str, TensorInfo]
    config: AdapterConfig
    base: BaseNames
    base_tensors: Mapping[str, TensorInfo]
    base_config: Mapping[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One kind of adapter weights; a file of this folder holds it as `FAMILY`."""

    name: str
    claim: Callable[[AdapterView], Iterable[Claim]]
    """Yield what it understands; raise InputRefused for keys of its own that make no sense."""


@cache
def families() -> tuple[Family, ...]:
    """Return the families there are, by name."""
    package = importlib.import_module("toolchain.merging.families")
    modules = (
        importlib.import_module(f"{package.__name__}.{module.name}")
        for module in pkgutil.iter_modules(package.__path__)
    )
    found = [module.FAMILY for module in modules if hasattr(module, "FAMILY")]
    return tuple(sorted(found, key=lambda family: family.name))
