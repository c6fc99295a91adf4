"""Plan a merge from headers and configurations only.

A plan is a list of output tensors, each with its source (a tensor of the base, of an adapter, or
one decoded from several) and its changes. So one kernel handles linear layers, convolutions,
embeddings, biases and experts, and the writer knows no kind of adapter. A map from base tensors to
terms could not replace, add or rename tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from weightsmith.core.errors import InputRefused, UsageError
from weightsmith.core.safe_parse import read_json
from weightsmith.core.values import JsonValue
from weightsmith.merging.adapter_config import AdapterConfig, read_adapter_config
from weightsmith.merging.base import (
    BaseTensors,
    replicate,
    replicated_settings,
    same_layers,
)
from weightsmith.merging.claim import AdapterView, Claim
from weightsmith.merging.claims import claims_of, unmatched_parameters
from weightsmith.merging.combining.combination import Combination
from weightsmith.merging.compose import compose
from weightsmith.merging.families import families
from weightsmith.merging.left_out import without_left_out
from weightsmith.merging.loading import loaded_names, split_names
from weightsmith.merging.names import BaseNames, plain_key
from weightsmith.merging.outputs import MergedTensor, OutputShard, StoredTensor
from weightsmith.merging.quantized.base import STALE, BaseView, base_view
from weightsmith.merging.quantized.choice import simulates
from weightsmith.merging.quantized.sources import held_bytes
from weightsmith.merging.refused import REFUSED, UNMERGED
from weightsmith.merging.tasks import task_settings
from weightsmith.merging.tying import Tie, find_tie, stored_apart
from weightsmith.models.folder import check_adapter_folder, check_model_folder
from weightsmith.models.peft_patterns import check_peft_patterns, limit_matching
from weightsmith.models.safetensors import (
    CheckpointIndex,
    SafetensorsHeader,
    open_checkpoint,
    read_header,
)

DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
KINDS = ("merged", "copied", "replaced")
"""Kinds of output tensors."""
START_BYTES = 100 << 20
"""Resident memory of Python with numpy imported, rounded up."""
BLOCK_BYTES = 24 << 20
"""Buffers per worker."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedAdapter:
    """An adapter of the plan."""

    root: Path
    weight: float
    header: SafetensorsHeader
    config: AdapterConfig
    files: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class MergePlan:
    """A planned merge."""

    base: CheckpointIndex
    base_files: tuple[str, ...]
    config: Mapping[str, JsonValue]
    adapters: tuple[PlannedAdapter, ...]
    shards: tuple[OutputShard, ...]
    """The files to write, named like the base's."""
    dtype: str
    """`auto`, or the safetensors dtype that all floating-point tensors are cast to."""
    settings: Mapping[str, JsonValue] = field(default_factory=dict)
    """Changed settings of config.json; None removes a key."""
    quantized_base: Mapping[str, JsonValue] = field(default_factory=dict)
    """The choice for a quantized base, and the number of tensors concerned."""
    findings: tuple[str, ...] = ()

    @property
    def outputs(self) -> dict[str, MergedTensor]:
        """Every tensor to write, by name."""
        return {output.name: output for shard in self.shards for output in shard.outputs}

    def count(self, kind: str) -> int:
        """Return the number of outputs of a kind."""
        return sum(output.kind == kind for output in self.outputs.values())

    def bytes_of(self, kind: str) -> int:
        """Return the total bytes of outputs of a kind."""
        return sum(output.size for output in self.outputs.values() if output.kind == kind)


def make_plan(
    base: Path,
    adapters: Sequence[tuple[Path, float]],
    *,
    dtype: str = "auto",
    combination: Combination | None = None,
    quantized_base: str = "refuse",
) -> MergePlan:
    """Return the plan, from the headers and configurations of base and adapters.

    Every adapter key is used exactly once. Raises InputRefused for unused, missing, ambiguous or
    quantized tensors and wrong shapes, UsageError for an invalid weight.
    """
    _check_weights(adapters)
    combination = _for_adapters(combination or Combination(), len(adapters))
    files = check_model_folder(base)
    index, based = _opened(base, quantized_base, tuple(_stamp(base / name) for name in files))
    planned = tuple(_open_adapter(root, weight) for root, weight in adapters)
    _check_factor_space(combination, planned)
    tensors, config = based.tensors, based.config
    settings: dict[str, JsonValue] = {}
    if layers := same_layers([adapter.config.raw.get("layer_replication") for adapter in planned]):
        tensors, settings = replicate(tensors, layers), replicated_settings(config, layers)
    loaded = loaded_names(config, tensors.sources)
    tie = find_tie(config, tensors.sources, loaded)
    apart = tie if tie and planned and stored_apart(tie, tensors.sources) else None
    tie = None if apart else tie
    names = BaseNames(tensors.sources, loaded, split_names(config, tensors.sources))
    views = [_view(n, one, tensors, config, names, tie, apart) for n, one in enumerate(planned)]
    claimed = [_claims(view) for view in views]
    claims = [claims for claims, _ in claimed]
    made = compose(tensors, tie, views, claims, DTYPES.get(dtype, "auto"), combination)
    return MergePlan(
        base=index,
        base_files=tuple(name for name in files if not (based.dropped and name in STALE)),
        config=config,
        adapters=planned,
        shards=made.shards,
        dtype=DTYPES.get(dtype, "auto"),
        settings={
            **dict.fromkeys(based.dropped),
            **settings,
            **({"tie_word_embeddings": False} if apart else {}),
            **made.settings,
            **task_settings(config, views, claims),
        },
        quantized_base=based.record,
        findings=(
            *based.findings,
            *_unknown_fields(planned),
            *_other_bases(planned, config),
            *_rounded_bases(planned, config, quantized_base),
            *(text for _, texts in claimed for text in texts),
            *made.findings,
            *_replicated(settings),
            *((_untied(apart),) if apart else ()),
        ),
    )


@lru_cache(maxsize=1)
def _opened(
    base: Path, quantized_base: str, _stamps: tuple[tuple[int, ...], ...]
) -> tuple[CheckpointIndex, BaseView]:
    """Return a base's tensors; a fleet merges hundreds of adapters into the same 90,000."""
    index = open_checkpoint(base)
    return index, base_view(index, read_json(base / "config.json"), quantized_base)


def _stamp(path: Path) -> tuple[int, ...]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev


def estimate(plan: MergePlan, workers: int = 1) -> dict[str, int]:
    """Return a merge's `read_bytes`, `write_bytes` and `peak_memory_bytes`."""
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
        "peak_memory_bytes": START_BYTES + held + max(1, workers) * BLOCK_BYTES,
    }


def _held(output: MergedTensor) -> int:
    """Return the memory in bytes that an output's factors or change take."""
    source = held_bytes(output.source)
    if output.change is not None:
        return source + 8 * output.change.held_elements(output)
    elements = sum(term.rank * sum(term.shape) for term in output.terms)
    parts = [part for term in output.terms for part in (term.left, term.right) if part]
    cut = {part.stored.info.name: part for part in parts if not part.whole}
    # Sliced tensors are kept whole: this output's and a neighbour's.
    kept = 2 * sum(part.height * part.width for part in cut.values()) * 4
    # Factors and their norms: float64 for float32 outputs, else float32.
    return source + kept + elements * (24 if output.dtype == "F32" else 12)


def _check_weights(adapters: Sequence[tuple[Path, float]]) -> None:
    for root, weight in adapters:
        if not math.isfinite(weight):
            raise UsageError(f"invalid weight {weight} for {root}", hint="give a finite number")


def _for_adapters(combination: Combination, count: int) -> Combination:
    """Return the method for `count` adapters: one alone on factors uses `linear`, as in PEFT."""
    if combination.space == "factors" and count == 1:
        return Combination(method="linear", space="factors")
    return combination


def _check_factor_space(combination: Combination, adapters: Sequence[PlannedAdapter]) -> None:
    """Refuse rslora on factors: PEFT's combined adapter inherits it and applies it twice."""
    if combination.space == "factors" and adapters and adapters[0].config.use_rslora:
        raise InputRefused(
            f"{adapters[0].root} uses rslora, which PEFT's combination of factors applies twice",
            hint="omit --space: delta space uses the correct scaling",
        )


def _open_adapter(root: Path, weight: float) -> PlannedAdapter:
    files = check_adapter_folder(root)
    config = read_adapter_config(root)
    _check_method(root, config.kind)
    header = read_header(root / "adapter_model.safetensors")
    if not header.tensors:
        raise InputRefused(
            f"{header.path} has no tensors", hint="the adapter was saved empty; export it again"
        )
    return PlannedAdapter(
        root=root, weight=weight, header=header, config=config, files=tuple(files)
    )


def _check_method(root: Path, kind: str) -> None:
    """Refuse PEFT methods that no family merges."""
    if any(kind in family.kinds for family in families()):
        return
    reason = REFUSED.get(kind, "unknown method")
    raise InputRefused(
        f"{root / 'adapter_config.json'}: peft_type {kind!r} cannot be merged: {reason}",
        hint=UNMERGED,
    )


def _replicated(settings: Mapping[str, JsonValue]) -> list[str]:
    if not settings:
        return []
    counts = ", ".join(f"{name} {value}" for name, value in settings.items() if type(value) is int)
    return [f"layer_replication: replicas are written as separate layers; config.json has {counts}"]


def _untied(apart: Tie) -> str:
    return (
        f"config.json ties {apart.head} to {apart.embedding}, but the base has different weights "
        "for them, so transformers does not tie them: tie_word_embeddings is set to false"
    )


def _view(
    number: int,
    adapter: PlannedAdapter,
    tensors: BaseTensors,
    config: Mapping[str, JsonValue],
    names: BaseNames,
    tie: Tie | None,
    apart: Tie | None,
) -> AdapterView:
    return AdapterView(
        index=number,
        path=adapter.root,
        file=adapter.header.path,
        weight=adapter.weight,
        keys={info.name: info for info in adapter.header.tensors},
        config=adapter.config,
        names=names,
        sources=tensors.sources,
        base_config=config,
        tie=tie,
        apart=apart,
    )


def _claims(view: AdapterView) -> tuple[Sequence[Claim], tuple[str, ...]]:
    """Return an adapter's claims, and findings."""
    modules = {name.removesuffix(".weight") for name in view.sources}
    modules |= {plain_key(key).rsplit(".", parts)[0] for key in view.keys for parts in (1, 2)}
    check_peft_patterns(view.path, sorted(modules))
    with limit_matching(view.path, len(view.keys)):
        kept, findings = without_left_out(view)
        return claims_of(kept), (*findings, *_unmatched(kept))


def _unmatched(view: AdapterView) -> list[str]:
    names = ", ".join(unmatched_parameters(view))
    text = "adapter_config.json targets parameters that the base does not have"
    return [f"{view.path.name}: {text}: {names}"] if names else []


def _unknown_fields(adapters: Sequence[PlannedAdapter]) -> list[str]:
    return [
        f"{adapter.root.name}: adapter_config.json sets the unknown field {name}, which is ignored"
        for adapter in adapters
        for name in adapter.config.unknown
    ]


def _other_bases(adapters: Sequence[PlannedAdapter], config: Mapping[str, JsonValue]) -> list[str]:
    return [
        f"{adapter.root.name}: trained on {adapter.config.base_model!r} according to"
        f" adapter_config.json, but the base's model_type is {own}; the shapes fit, but check that"
        " it is the right base"
        for adapter in adapters
        if (own := other_family(adapter.config.base_model, config))
    ]


def _rounded_bases(
    adapters: Sequence[PlannedAdapter], config: Mapping[str, JsonValue], choice: str
) -> list[str]:
    """Return the adapters that corrected a rounding to 4 bits which this base does not have."""
    if simulates(choice) or config.get("quantization_config"):
        return []
    return [
        f"{adapter.root.name}: trained on {adapter.config.base_model!r}, in 4 bits, and merged into"
        " unrounded weights; compare with quantized_base: simulate-nf4 or simulate-nf4-double,"
        " which round this base as in training, or dequantize, with that base"
        for adapter in adapters
        if in_four_bits(adapter.config.base_model)
    ]


def can_be_virtual(plan: MergePlan) -> bool:
    """Return whether a merge's rows can be computed as often as they are needed.

    Sums of products, replaced rows and copies take little longer than reading. Other changes need
    whole tensors, and dequantized ones are made as a whole.
    """
    return all(
        output.change is None and isinstance(output.source, StoredTensor)
        for output in plan.outputs.values()
    )


_FAMILIES = frozenset({"llama", "qwen", "gemma", "mistral", "mixtral"})
"""Families with the same module names and, in small models, the same shapes.

Families whose models often have another family's `model_type` (Falcon, Granite, DeepSeek) are
omitted.
"""


def other_family(trained_on: str, config: Mapping[str, JsonValue]) -> str:
    """Return the base's `model_type` if the name `trained_on` contradicts it, else "".

    `trained_on` is `base_model_name_or_path`, a hub name or a path; only its last part is used.
    """
    own = str(config.get("model_type", ""))
    named = _families(_last(trained_on))
    return own if named and _families(own) and not named & _families(own) else ""


def in_four_bits(trained_on: str) -> bool:
    """Return whether a name is that of a checkpoint in bitsandbytes' 4 bits."""
    return "bnb-4bit" in _last(trained_on).lower()


def _last(name: str) -> str:
    return name.rstrip("/\\").replace("\\", "/").rpartition("/")[2]


def _families(name: str) -> frozenset[str]:
    return frozenset(family for family in _FAMILIES if family in name.lower())
