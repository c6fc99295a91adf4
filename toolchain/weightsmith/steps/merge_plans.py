"""What merges will take and write, from headers: a base is read once, and a merge planned once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from weightsmith.core.merge_options import Merge
from weightsmith.core.values import Digest, Sources
from weightsmith.models.reshard import is_numbered

if TYPE_CHECKING:
    from weightsmith.merging.plan import MergePlan, OpenedBase

_SOME = 4
"""Merges whose tensors are remembered: there may be 90,000."""


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """A tensor of the merged checkpoint; `size` in bytes."""

    name: str
    dtype: str
    size: int
    dimensions: int


@dataclass(frozen=True, slots=True)
class MergeCost:
    """What a merge takes, and whether its rows can be computed where they are read."""

    cost: Mapping[str, int]
    """`read_bytes`, `write_bytes` and `peak_memory_bytes`."""
    virtual: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedMerge:
    """What a merge will take and write."""

    cost: MergeCost
    tensors: tuple[PlannedTensor, ...]
    changed: frozenset[str]
    """Names of the tensors that depend on the adapters."""
    apart: frozenset[str]
    """Those, and copies that the base has not under this name, as of a head that is untied."""


class MergePlans:
    """Plans merges, for one command: a build asks for its own ten times, a fleet for hundreds.

    They are told apart by digests, so files may not change while it is used. Every method raises
    InputRefused for what the merge would refuse.
    """

    def __init__(self) -> None:
        self._opened = lru_cache(maxsize=1)(_opened)  # a fleet's adapters have the same base
        self._planned = lru_cache(maxsize=_SOME)(self._facts)
        self._cost = lru_cache(maxsize=None)(lambda *merge: self._planned(*merge).cost)

    def plan(self, sources: Sources, options: Merge) -> MergePlan:
        """Return the plan of a merge, which is not remembered."""
        return self._made(*_inputs(sources, options))

    def planned(self, sources: Sources, options: Merge) -> PlannedMerge:
        """Return what a merge will take and write."""
        return self._planned(*_inputs(sources, options))

    def cost(self, sources: Sources, options: Merge) -> MergeCost:
        """Return what a merge takes."""
        return self._cost(*_inputs(sources, options))

    def _made(self, base: _Folder, adapters: tuple[_Adapter, ...], options: Merge) -> MergePlan:
        from weightsmith.merging.plan import plan_onto

        opened = self._opened(*base, options.quantized_base)
        return plan_onto(opened, [(root, weight) for root, _, weight in adapters], options)

    def _facts(self, base: _Folder, adapters: tuple[_Adapter, ...], options: Merge) -> PlannedMerge:
        from weightsmith.merging.outputs import StoredTensor
        from weightsmith.merging.plan import can_be_virtual, estimate

        plan = self._made(base, adapters, options)
        outputs = plan.outputs.values()
        changed = frozenset(output.name for output in outputs if output.kind != "copied")
        moved = {
            output.name
            for output in outputs
            if isinstance(output.source, StoredTensor) and output.source.info.name != output.name
        }
        if any(map(is_numbered, moved)):  # replicated layers: files are cut by their number
            moved |= {output.name for output in outputs if is_numbered(output.name)}
        return PlannedMerge(
            cost=MergeCost(estimate(plan), can_be_virtual(plan)),
            tensors=tuple(PlannedTensor(o.name, o.dtype, o.size, len(o.shape)) for o in outputs),
            changed=changed,
            apart=changed | moved,
        )


_Folder = tuple[Path, Digest]
_Adapter = tuple[Path, Digest, float]


def _inputs(sources: Sources, options: Merge) -> tuple[_Folder, tuple[_Adapter, ...], Merge]:
    """Return what a plan depends on."""
    adapters = ((a.snapshot.tree.root, a.snapshot.digest, a.weight) for a in sources.adapters)
    return (sources.base.tree.root, sources.base.digest), tuple(adapters), options


def _opened(base: Path, _digest: Digest, quantized_base: str) -> OpenedBase:
    from weightsmith.merging.plan import open_base

    return open_base(base, quantized_base)
