"""The merge, planned from headers and configurations alone: cheap, complete, before any work."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weightsmith.checkpoints.folder import check_adapter_folder, check_model_folder
from weightsmith.checkpoints.peft_patterns import check_peft_patterns, reading_names
from weightsmith.checkpoints.safetensors import (
    CheckpointIndex,
    Header,
    open_checkpoint,
    read_header,
)
from weightsmith.errors import InputRefused, UsageError
from weightsmith.foreign import read_json
from weightsmith.merging.adapter_config import AdapterConfig, read_adapter_config
from weightsmith.merging.base import (
    BaseTensors,
    replicate,
    replicated_settings,
    same_layers,
)
from weightsmith.merging.claim import AdapterView, Claim
from weightsmith.merging.claims import claims_of
from weightsmith.merging.combining.combination import Combination
from weightsmith.merging.compose import compose
from weightsmith.merging.families import families
from weightsmith.merging.names import BaseNames, plain_key
from weightsmith.merging.origin import other_family
from weightsmith.merging.outputs import Output, OutputShard
from weightsmith.merging.quantized.base import STALE, see_base
from weightsmith.merging.quantized.sources import held_bytes
from weightsmith.merging.refused import REFUSED, UNMERGED
from weightsmith.merging.tasks import task_settings
from weightsmith.merging.tying import Tie, find_tie

DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
KINDS = ("merged", "copied", "replaced")
"""What becomes of a tensor."""
_START_BYTES = 100 << 20
"""Resident memory of Python with numpy imported, generously."""
_TORCH_BYTES = 200 << 20
"""What importing torch adds, for `fast`."""
_BLOCK_BYTES = 24 << 20
"""Buffers of one worker."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedAdapter:
    """One adapter of the plan."""

    root: Path
    weight: float
    header: Header
    config: AdapterConfig
    files: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class MergePlan:
    """Everything that a merge will do."""

    base: CheckpointIndex
    base_files: tuple[str, ...]
    config: Mapping[str, Any]
    adapters: tuple[PlannedAdapter, ...]
    shards: tuple[OutputShard, ...]
    """The files to write; each has a shard of the base of the same name."""
    dtype: str
    """`auto`, or the safetensors type that all floating tensors are cast to."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What config.json says differently afterwards; None is left out."""
    quantized_base: Mapping[str, Any] = field(default_factory=dict)
    """What was chosen for a quantized base, and how much of it that concerned."""
    findings: tuple[str, ...] = ()

    @property
    def outputs(self) -> dict[str, Output]:
        """Every tensor to write, by name."""
        return {output.name: output for shard in self.shards for output in shard.outputs}

    def count(self, kind: str) -> int:
        """Return how many outputs are of a kind."""
        return sum(output.kind == kind for output in self.outputs.values())

    def bytes_of(self, kind: str) -> int:
        """Return the bytes of all outputs of a kind."""
        return sum(output.size for output in self.outputs.values() if output.kind == kind)


def make_plan(
    base: Path,
    adapters: Sequence[tuple[Path, float]],
    *,
    dtype: str = "auto",
    combination: Combination | None = None,
    quantized_base: str = "refuse",
) -> MergePlan:
    """Read both sides' headers and configurations, and return what becomes of which tensor.

    Every adapter key is used exactly once. Raises InputRefused for anything left over, missing,
    ambiguous, quantized or of another shape, UsageError for an unknown dtype, method or weight.
    """
    _check_request(adapters, dtype)
    combination = _for_adapters(combination or Combination(), len(adapters))
    files = check_model_folder(base)
    index = open_checkpoint(base)
    seen = see_base(index, read_json(base / "config.json"), quantized_base)
    planned = tuple(_open_adapter(root, weight) for root, weight in adapters)
    _check_factor_space(combination, planned)
    tensors, config = seen.tensors, seen.config
    settings: dict[str, Any] = {}
    if layers := same_layers([adapter.config.raw.get("layer_replication") for adapter in planned]):
        tensors, settings = replicate(tensors, layers), replicated_settings(config, layers)
    tie = find_tie(config, tensors.sources)
    views = [_view(n, adapter, tensors, config, tie) for n, adapter in enumerate(planned)]
    claims = [_claims(view) for view in views]
    made = compose(tensors, tie, views, claims, DTYPES.get(dtype, "auto"), combination)
    return MergePlan(
        base=index,
        base_files=tuple(name for name in files if not (seen.dropped and name in STALE)),
        config=config,
        adapters=planned,
        shards=made.shards,
        dtype=DTYPES.get(dtype, "auto"),
        settings={
            **dict.fromkeys(seen.dropped),
            **settings,
            **made.settings,
            **task_settings(config, views, claims),
        },
        quantized_base=seen.record,
        findings=(
            *seen.findings,
            *_unknown_fields(planned),
            *_other_bases(planned, config),
            *made.findings,
            *_replicated(settings),
        ),
    )


def estimate(plan: MergePlan, workers: int = 1, *, exact: bool = True) -> dict[str, int]:
    """Return a merge's `read_bytes`, `write_bytes` and `peak_memory_bytes`, from the plan alone."""
    shards = sum(shard.file_size for shard in plan.base.shards)
    headers = sum(
        shard.file_size - sum(t.size for t in shard.tensors) for shard in plan.base.shards
    )
    adapters = sum(adapter.header.file_size for adapter in plan.adapters)
    others = sum(
        (plan.base.root / name).stat().st_size
        for name in plan.base_files
        if not name.endswith(".safetensors")
    )
    held = max((_held(output) for output in plan.outputs.values()), default=0)
    return {
        "read_bytes": shards + adapters + others,
        "write_bytes": headers + sum(shard.size for shard in plan.shards) + others,
        "peak_memory_bytes": _START_BYTES
        + (0 if exact else _TORCH_BYTES)
        + held
        + max(1, workers) * _BLOCK_BYTES,
    }


def _held(output: Output) -> int:
    """Return the bytes that one output's factors take, or what computes it."""
    source = held_bytes(output.source)
    if output.change is not None:
        return source + 8 * output.change.held_elements(output)
    elements = sum(term.rank * sum(term.shape) for term in output.terms)
    parts = [part for term in output.terms for part in (term.left, term.right) if part]
    cut = {part.stored.info.name: part for part in parts if not part.whole}
    # Tensors that are read in parts stay as a whole, this one's and those of a neighbour.
    kept = 2 * sum(part.height * part.width for part in cut.values()) * 4
    # float64 factors and their norms where float32 weights are written, float32 otherwise.
    return source + kept + elements * (24 if output.dtype == "F32" else 12)


def _check_request(adapters: Sequence[tuple[Path, float]], dtype: str) -> None:
    if dtype not in ("auto", *DTYPES):
        raise UsageError(f"unknown dtype {dtype!r}", hint=f"one of auto, {', '.join(DTYPES)}")
    for root, weight in adapters:
        if not math.isfinite(weight):
            raise UsageError(f"the weight of {root} is {weight}", hint="give a finite number")


def _for_adapters(combination: Combination, count: int) -> Combination:
    """Return the method for so many adapters: on factors, a single one is `linear`, as in PEFT."""
    if combination.space == "factors" and count == 1:
        return Combination(method="linear", space="factors")
    return combination


def _check_factor_space(combination: Combination, adapters: Sequence[PlannedAdapter]) -> None:
    """Refuse where PEFT's own combination is wrong: the first adapter's rslora is inherited."""
    if combination.space == "factors" and adapters and adapters[0].config.use_rslora:
        raise InputRefused(
            f"{adapters[0].root} uses rslora, which PEFT's combined adapter inherits: it would "
            "count the root of its rank too often",
            hint="leave --space out: in delta space every scaling counts as what it is",
        )


def _open_adapter(root: Path, weight: float) -> PlannedAdapter:
    files = check_adapter_folder(root)
    config = read_adapter_config(root)
    _check_method(root, config.kind)
    header = read_header(root / "adapter_model.safetensors")
    if not header.tensors:
        raise InputRefused(
            f"{header.path} holds no tensors", hint="the adapter was saved empty; export it again"
        )
    return PlannedAdapter(
        root=root, weight=weight, header=header, config=config, files=tuple(files)
    )


def _check_method(root: Path, kind: str) -> None:
    """Refuse methods of PEFT that no family merges, with the reason."""
    if any(kind in family.kinds for family in families()):
        return
    reason = REFUSED.get(kind, "this version does not know the method")
    raise InputRefused(
        f"{root / 'adapter_config.json'} is of type {kind!r}, which cannot be merged: {reason}",
        hint=UNMERGED,
    )


def _replicated(settings: Mapping[str, Any]) -> list[str]:
    if not settings:
        return []
    counts = ", ".join(f"{name} {value}" for name, value in settings.items() if type(value) is int)
    return [f"layer_replication: every replica is written out; config.json says {counts}"]


def _view(
    number: int,
    adapter: PlannedAdapter,
    tensors: BaseTensors,
    config: Mapping[str, Any],
    tie: Tie | None,
) -> AdapterView:
    return AdapterView(
        index=number,
        path=adapter.root,
        file=adapter.header.path,
        weight=adapter.weight,
        keys={info.name: info for info in adapter.header.tensors},
        config=adapter.config,
        names=BaseNames(tensors.sources),
        sources=tensors.sources,
        base_config=config,
        tie=tie,
    )


def _claims(view: AdapterView) -> Sequence[Claim]:
    modules = {name.removesuffix(".weight") for name in view.sources}
    modules |= {plain_key(key).rsplit(".", parts)[0] for key in view.keys for parts in (1, 2)}
    check_peft_patterns(view.path, sorted(modules))
    with reading_names(view.path, len(view.keys)):
        return claims_of(view)


def _unknown_fields(adapters: Sequence[PlannedAdapter]) -> list[str]:
    return [
        f"{adapter.root.name}: adapter_config.json sets {name}, which this version ignores"
        for adapter in adapters
        for name in adapter.config.unknown
    ]


def _other_bases(adapters: Sequence[PlannedAdapter], config: Mapping[str, Any]) -> list[str]:
    return [
        f"{adapter.root.name}: adapter_config.json says that it was trained on"
        f" {adapter.config.base_model!r}, and the base is of type {own}; the shapes fit, but make"
        " sure that it is the right base"
        for adapter in adapters
        if (own := other_family(adapter.config.base_model, config))
    ]
