"""What a family of adapter weights claims: the keys it understood, and what they do to the base."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from weightsmith.checkpoints.safetensors import TensorInfo
from weightsmith.errors import InputRefused
from weightsmith.merging.adapter_config import AdapterConfig
from weightsmith.merging.names import BaseNames
from weightsmith.merging.outputs import Change, Patch, Source, Stored, Term
from weightsmith.merging.tying import Tie, is_head

SHOWN = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """Adapter keys that a family understood, the base tensor they change, and how: one way of it.

    `terms` are added, `patch` replaces rows, `replacement` the tensor, `change` computes it.
    """

    keys: tuple[str, ...]
    """Each key of the adapter is in one claim; further claims of the same key leave them out."""
    module: str
    """The module's name in the model."""
    target: str = ""
    """The base tensor's name; empty for keys that only training needs."""
    both: bool = False
    """True where a weight that embedding and head share changes for both of them."""
    columns: int = 0
    """Width of the matrix that the target is seen as; 0 for what its shape says."""
    terms: tuple[Term, ...] = ()
    patch: Patch | None = None
    replacement: Stored | None = None
    change: Change | None = None
    new: bool = False
    """True where the base has no such tensor: the head of another task."""

    @property
    def kind(self) -> str:
        """Which of the ways it is."""
        ways = ("terms", "patch", "replacement", "change")
        return next(way for way in ways if getattr(self, way))


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterView:
    """What a family may look at: one adapter's keys and configuration, and the base's tensors."""

    index: int
    """The adapter's place in the request."""
    path: Path
    """The adapter's folder."""
    file: Path
    """The file that holds `keys`."""
    weight: float
    keys: Mapping[str, TensorInfo]
    config: AdapterConfig
    names: BaseNames
    sources: Mapping[str, Source]
    """The base's tensors, quantized ones as what they decode to."""
    base_config: Mapping[str, object]
    tie: Tie | None = None
    """The weight that the base's embedding and head share."""

    def stored(self, key: str) -> Stored:
        """Return one of the adapter's tensors."""
        return Stored(path=self.file, info=self.keys[key])

    def source(self, target: str) -> Source:
        """Return a target's values before the merge; a tied head has its embedding's."""
        tied = self.tie and target == self.tie.head
        return self.sources[self.tie.embedding if self.tie and tied else target]

    def shape(self, target: str) -> tuple[int, ...]:
        """Return a target's shape."""
        return self.source(target).shape

    def factor(self, scaling: float) -> float:
        """Return weight · scaling; raise InputRefused where that overflows."""
        factor = self.weight * scaling
        if not math.isfinite(factor):
            raise InputRefused(
                f"{self.path}: weight {self.weight} times scaling {scaling} overflows",
                hint="give a smaller weight",
            )
        return factor

    def second_name(self, name: str) -> str:
        """Return the base's tensor that a tied one is another name of, or nothing."""
        biases = self.tie.also if self.tie and name.endswith(".bias") else ()
        return dict(biases).get(name, "")

    def find(self, module: str, parameter: str = "weight") -> str:
        """Return the one base tensor that a module's parameter means, or nothing.

        Raises InputRefused where several could be meant.
        """
        if self.tie and parameter == "weight" and is_head(module):
            return self.tie.head
        name = f"{module}.{parameter}"
        found = self.names.find(name) or self.names.find(self.second_name(name) or name)
        if len(found) > 1:
            raise InputRefused(
                f"{self.path}: {module} may mean several base tensors: {', '.join(found[:SHOWN])}",
                hint="rename the adapter's keys so that they carry the full module path",
            )
        return found[0] if found else ""

    def need(self, module: str, parameter: str = "weight") -> str:
        """Return the one base tensor that a module's parameter means; raise where there is none."""
        found = self.find(module, parameter)
        if not found:
            raise InputRefused(
                f"{self.path} changes {module}, which the base does not have",
                hint="the adapter belongs to another model: "
                f"{self.config.base_model or '(not named)'!r}",
            )
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One row of the reference's table of what can be merged."""

    name: str
    """As users know it."""
    how: str
    """What the merge does, or why there is none and what to do instead."""
    merged: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One kind of adapter weights; a file of this folder holds it as `FAMILY`."""

    name: str
    kinds: frozenset[str]
    """The `peft_type`s that it looks at."""
    claim: Callable[[AdapterView], Iterable[Claim]]
    """Yield what it understands; raise InputRefused for keys of its own that make no sense."""
    variants: tuple[Variant, ...] = ()
    every: bool = False
    """True where adapters of all other kinds may have such keys too."""
