"""The merge, planned from headers and configurations alone: cheap, complete, before any work."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.checkpoints.folder import check_adapter_folder, check_model_folder
from toolchain.checkpoints.safetensors import (
    BITS,
    CheckpointIndex,
    Header,
    TensorInfo,
    open_checkpoint,
    read_header,
    read_json,
)
from toolchain.errors import InputRefused, UsageError
from toolchain.merging.adapter_config import AdapterConfig, read_adapter_config
from toolchain.merging.families.family import AdapterView, Claim, Term, families
from toolchain.merging.names import BaseNames, added_prefix

DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
MERGEABLE = frozenset(DTYPES.values())
METHODS = ("sequential", "linear")
_FLOATS = MERGEABLE | {"F64"}
_QUANTIZED_KEYS = (".absmax", ".quant_map", ".qweight", ".qzeros", ".SCB", ".weight_packed")
_SHOWN = 5
_START_BYTES = 250 << 20
"""Resident memory of Python with torch imported."""
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
    """Everything that a merge will do: what is not in `terms` is copied."""

    base: CheckpointIndex
    base_files: tuple[str, ...]
    config: Mapping[str, Any]
    adapters: tuple[PlannedAdapter, ...]
    terms: Mapping[str, tuple[Term, ...]]
    """Base tensor -> what is added to it, in the order of the adapters."""
    dtype: str
    """`auto`, or the safetensors type that all floating tensors are cast to."""
    findings: tuple[str, ...] = ()

    def out_dtype(self, info: TensorInfo) -> str:
        """Return the type that a base tensor is written in."""
        return self.dtype if self.dtype != "auto" and info.dtype in _FLOATS else info.dtype

    def copied(self, info: TensorInfo) -> bool:
        """Say whether the tensor's bytes are written as they are."""
        return info.name not in self.terms and self.out_dtype(info) == info.dtype


def make_plan(
    base: Path,
    adapters: Sequence[tuple[Path, float]],
    *,
    dtype: str = "auto",
    method: str = "sequential",
) -> MergePlan:
    """Read both sides' headers and configurations, and return what to add to which tensor.

    Every adapter key is used exactly once. Raises InputRefused for anything left over, missing,
    ambiguous, quantized or of another shape, UsageError for an unknown dtype, method or weight.
    """
    _check_request(adapters, dtype, method)
    files = check_model_folder(base)
    config = read_json(base / "config.json")
    index = open_checkpoint(base)
    _refuse_quantized(base, config, index)
    planned = tuple(_open_adapter(root, weight) for root, weight in adapters)
    tensors = index.tensors
    terms: dict[str, list[Term]] = defaultdict(list)
    findings: list[str] = []
    for number, adapter in enumerate(planned):
        view = _view(number, adapter, tensors, config)
        for claim in _claims(view):
            terms[claim.target].append(claim.term)
        findings += [
            f"{adapter.root.name}: adapter_config.json sets {name}, which this version ignores"
            for name in adapter.config.unknown
        ]
    _check_mergeable(tensors, terms)
    return MergePlan(
        base=index,
        base_files=tuple(files),
        config=config,
        adapters=planned,
        terms={name: tuple(added) for name, added in terms.items()},
        dtype=DTYPES.get(dtype, "auto"),
        findings=tuple(findings),
    )


def estimate(plan: MergePlan, workers: int = 1) -> dict[str, int]:
    """Return a merge's `read_bytes`, `write_bytes` and `peak_memory_bytes`, from the plan alone."""
    sizes = plan.base.tensors
    shards = sum(shard.file_size for shard in plan.base.shards)
    written = shards + sum(
        math.prod(info.shape) * BITS[plan.out_dtype(info)] // 8 - info.size
        for info in sizes.values()
    )
    adapters = sum(adapter.header.file_size for adapter in plan.adapters)
    others = sum(
        (plan.base.root / name).stat().st_size
        for name in plan.base_files
        if not name.endswith(".safetensors")
    )
    # float64 factors and their norms where float32 weights are written, float32 otherwise.
    held = max((_held(plan, sizes[name], terms) for name, terms in plan.terms.items()), default=0)
    return {
        "read_bytes": shards + adapters + others,
        "write_bytes": written + others,
        "peak_memory_bytes": _START_BYTES + held + max(1, workers) * _BLOCK_BYTES,
    }


def _held(plan: MergePlan, info: TensorInfo, terms: tuple[Term, ...]) -> int:
    elements = sum(term.rank * sum(term.delta_shape) for term in terms)
    return elements * (24 if plan.out_dtype(info) == "F32" else 12)


def _check_request(adapters: Sequence[tuple[Path, float]], dtype: str, method: str) -> None:
    if dtype not in ("auto", *DTYPES):
        raise UsageError(f"unknown dtype {dtype!r}", hint=f"one of auto, {', '.join(DTYPES)}")
    if method not in METHODS:
        raise UsageError(f"unknown merge method {method!r}", hint=f"one of {', '.join(METHODS)}")
    for root, weight in adapters:
        if not math.isfinite(weight):
            raise UsageError(f"the weight of {root} is {weight}", hint="give a finite number")


def _open_adapter(root: Path, weight: float) -> PlannedAdapter:
    files = check_adapter_folder(root)
    config = read_adapter_config(root)
    header = read_header(root / "adapter_model.safetensors")
    if not header.tensors:
        raise InputRefused(
            f"{header.path} holds no tensors", hint="the adapter was saved empty; export it again"
        )
    return PlannedAdapter(
        root=root, weight=weight, header=header, config=config, files=tuple(files)
    )


def _view(
    number: int,
    adapter: PlannedAdapter,
    tensors: Mapping[str, TensorInfo],
    config: Mapping[str, Any],
) -> AdapterView:
    return AdapterView(
        index=number,
        path=str(adapter.root),
        weight=adapter.weight,
        keys={info.name: info for info in adapter.header.tensors},
        config=adapter.config,
        base=BaseNames(tensors),
        base_tensors=tensors,
        base_config=config,
    )


def _claims(view: AdapterView) -> list[Claim]:
    """Return what all families understood; every key once, every targeted module there."""
    claims = [claim for family in families() for claim in family.claim(view)]
    used = [key for claim in claims for key in claim.keys]
    left = sorted(view.keys.keys() - set(used))
    if left:
        raise InputRefused(
            f"{view.path} has {len(left)} tensors that are no plain LoRA: "
            + "; ".join(f"{key} ({_kind(key)})" for key in left[:_SHOWN]),
            hint="only LoRA on linear layers can be merged yet; serve this adapter unmerged",
        )
    counts = Counter(claim.target for claim in claims)
    twice = sorted(target for target, count in counts.items() if count > 1)
    if len(used) != len(set(used)) or twice:
        raise InputRefused(
            f"{view.path} changes {', '.join(twice[:_SHOWN])} twice",
            hint="two of its modules mean the same base tensor; export one adapter per folder",
        )
    _check_complete(view, claims)
    return claims


def _kind(key: str) -> str:
    """Say in a few words what an unsupported key is."""
    kinds = {
        "lora_embedding_": "LoRA on an embedding",
        "lora_magnitude_vector": "DoRA",
        "lora_B.bias": "a LoRA bias",
        "trainable_tokens": "trained tokens",
        "modules_to_save": "a fully trained module",
        "base_layer": "a trained base weight",
        "lora_diag": "KaSA",
        "lora_": "an unknown LoRA tensor",
    }
    return next((text for part, text in kinds.items() if part in key), "a full weight")


def _check_complete(view: AdapterView, claims: Sequence[Claim]) -> None:
    """Refuse where the configuration targets modules of the base that the file has no keys for."""
    if not claims or view.config.target_modules is None:
        return
    # The base's names are translated as the first module's was: they may lack `model.`.
    cut, put = added_prefix(f"{claims[0].module}.weight", claims[0].target)
    have = {claim.target for claim in claims}
    missing = []
    for name, info in view.base_tensors.items():
        module = put + name.removeprefix(cut).removesuffix(".weight")
        matrix = name.endswith(".weight") and len(info.shape) == 2
        if matrix and name not in have and view.config.targets(module):
            missing.append(module)
    if missing:
        raise InputRefused(
            f"{view.path} targets {len(missing)} modules that it has no weights for, such as "
            + ", ".join(missing[:_SHOWN]),
            hint="the adapter file is incomplete or its keys were renamed; export it again",
        )


def _refuse_quantized(base: Path, config: Mapping[str, Any], index: CheckpointIndex) -> None:
    marks = [name for name in index.tensors if name.endswith(_QUANTIZED_KEYS)]
    marks += [name for name in index.tensors if ".quant_state." in name]
    if config.get("quantization_config") or marks:
        what = f"tensors such as {marks[0]}" if marks else "quantization_config in config.json"
        raise InputRefused(
            f"{base} is quantized: it has {what}",
            hint="merge onto the original 16-bit checkpoint and quantize afterwards: adding to a "
            "quantized base and quantizing again erases small changes",
        )


def _check_mergeable(
    tensors: Mapping[str, TensorInfo], terms: Mapping[str, Sequence[Term]]
) -> None:
    for name in terms:
        if tensors[name].dtype not in MERGEABLE:
            raise InputRefused(
                f"the base's {name} is of type {tensors[name].dtype}",
                hint="adapters can be merged onto bfloat16, float16 and float32 weights",
            )
