"""Plan a merge from headers and configurations only.

A plan is a list of output tensors, each with its source (a tensor of the base, of an adapter, or
one decoded from several) and its changes. So one kernel handles linear layers, convolutions,
embeddings, biases and experts, and the writer knows no kind of adapter. A map from base tensors to
terms could not replace, add or rename tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from operator import attrgetter
from pathlib import Path

from weightsmith.core.errors import InputRefused, UsageError
from weightsmith.core.safe_parse import read_json
from weightsmith.core.values import JsonValue
from weightsmith.merging.adapter_config import REFUSED, UNMERGED, read_adapter_config
from weightsmith.merging.base import replicate, replicated_settings, same_layers
from weightsmith.merging.claim import AdapterView, Claim, read_adapter
from weightsmith.merging.claims import (
    claims_of,
    task_settings,
    unmatched_parameters,
    without_left_out,
)
from weightsmith.merging.combining.combination import Combination
from weightsmith.merging.compose import compose
from weightsmith.merging.families import families
from weightsmith.merging.names import BaseNames, loaded_names, plain_key, split_names
from weightsmith.merging.outputs import MergedTensor, OutputShard, StoredTensor
from weightsmith.merging.quantized.base import (
    STALE,
    BaseView,
    ComputedSource,
    base_view,
    simulates,
)
from weightsmith.merging.tying import Tie, find_tie, stored_apart
from weightsmith.models.folder import check_adapter_folder, check_model_folder
from weightsmith.models.peft_patterns import check_peft_patterns, limit_matching
from weightsmith.models.safetensors import CheckpointIndex, open_checkpoint

DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
KINDS = ("merged", "copied", "replaced")
"""Kinds of output tensors."""
START_BYTES = 100 << 20
"""Resident memory of Python with numpy imported, rounded up."""
BLOCK_BYTES = 24 << 20
"""Buffers per worker."""
_STAMP = attrgetter("st_size", "st_mtime_ns", "st_ctime_ns", "st_ino", "st_dev")
_FAMILIES = frozenset({"llama", "qwen", "gemma", "mistral", "mixtral"})
"""Families with the same module names and, in small models, the same shapes.

Families whose models often have another family's `model_type` (Falcon, Granite, DeepSeek) are
omitted.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class MergePlan:
    """A planned merge."""

    base: CheckpointIndex
    base_files: tuple[str, ...]
    config: Mapping[str, JsonValue]
    adapters: tuple[AdapterView, ...]
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
    for root, weight in adapters:
        if not math.isfinite(weight):
            raise UsageError(f"invalid weight {weight} for {root}", hint="give a finite number")
    combination, dtype = combination or Combination(), DTYPES.get(dtype, "auto")
    if combination.space == "factors" and len(adapters) == 1:
        combination = Combination(method="linear", space="factors")  # as in PEFT
    files = check_model_folder(base)
    stamps = tuple(_STAMP((base / name).stat()) for name in files)
    index, based = _opened(base, quantized_base, stamps)
    read = [_open_adapter(root, weight) for root, weight in adapters]
    if combination.space == "factors" and read and read[0].config.use_rslora:
        # PEFT's combined adapter inherits it and applies it twice.
        raise InputRefused(
            f"{read[0].path} uses rslora, which PEFT's combination of factors applies twice",
            hint="omit --space: delta space uses the correct scaling",
        )
    tensors, config = based.tensors, based.config
    settings: dict[str, JsonValue] = {}
    if layers := same_layers([adapter.config.raw.get("layer_replication") for adapter in read]):
        tensors, settings = replicate(tensors, layers), replicated_settings(config, layers)
    loaded = loaded_names(config, tensors.sources)
    tie = find_tie(config, tensors.sources, loaded)
    apart = tie if tie and read and stored_apart(tie, tensors.sources) else None
    tie = None if apart else tie
    names = BaseNames(tensors.sources, loaded, split_names(config, tensors.sources))
    onto = partial(
        replace, names=names, sources=tensors.sources, base_config=config, tie=tie, apart=apart
    )
    views = tuple(onto(adapter, index=number) for number, adapter in enumerate(read))
    claimed = [_claims(view) for view in views]
    claims = [claims for claims, _ in claimed]
    shards, changed, notes = compose(tensors, tie, views, claims, dtype, combination)
    return MergePlan(
        base=index,
        base_files=tuple(name for name in files if not (based.dropped and name in STALE)),
        config=config,
        adapters=views,
        shards=shards,
        dtype=dtype,
        settings={
            **dict.fromkeys(based.dropped),
            **settings,
            **({"tie_word_embeddings": False} if apart else {}),
            **changed,
            **task_settings(config, views, claims),
        },
        quantized_base=based.record,
        findings=(
            *based.findings,
            *_findings(views, config, quantized_base),
            *(text for _, texts in claimed for text in texts),
            *notes,
            *_written_apart(settings, apart),
        ),
    )


@lru_cache(maxsize=1)
def _opened(
    base: Path, quantized_base: str, _stamps: tuple[tuple[int, ...], ...]
) -> tuple[CheckpointIndex, BaseView]:
    """Return a base's tensors; a fleet merges hundreds of adapters into the same 90,000."""
    index = open_checkpoint(base)
    return index, base_view(index, read_json(base / "config.json"), quantized_base)


def estimate(plan: MergePlan, workers: int = 1) -> dict[str, int]:
    """Return a merge's `read_bytes`, `write_bytes` and `peak_memory_bytes`."""
    shards = sum(shard.file_size for shard in plan.base.shards)
    headers = sum(
        shard.file_size - sum(t.size for t in shard.tensors) for shard in plan.base.shards
    )
    adapters = sum(adapter.file.stat().st_size for adapter in plan.adapters)
    others = sum(
        (plan.base.root / name).stat().st_size
        for name in plan.base_files
        if not name.endswith(".safetensors")
    )
    held = max((_held_bytes(output) for output in plan.outputs.values()), default=0)
    return {
        "read_bytes": shards + adapters + others,
        "write_bytes": headers + sum(shard.size for shard in plan.shards) + others,
        "peak_memory_bytes": START_BYTES + held + max(1, workers) * BLOCK_BYTES,
    }


def _held_bytes(output: MergedTensor) -> int:
    source = output.source.held_bytes if isinstance(output.source, ComputedSource) else 0
    if output.change is not None:
        return source + 8 * output.change.held_elements(output)
    elements = sum(term.rank * sum(term.shape) for term in output.terms)
    parts = [part for term in output.terms for part in (term.left, term.right) if part]
    cut = {part.stored.info.name: part for part in parts if not part.whole}
    # Sliced tensors are kept whole: this output's and a neighbour's.
    kept = 2 * sum(part.height * part.width for part in cut.values()) * 4
    # Factors and their norms: float64 for float32 outputs, else float32.
    return source + kept + elements * (24 if output.dtype == "F32" else 12)


def _open_adapter(root: Path, weight: float) -> AdapterView:
    files = check_adapter_folder(root)
    config = read_adapter_config(root)
    if not any(config.kind in family.kinds for family in families()):
        reason = REFUSED.get(config.kind, "unknown method")
        raise InputRefused(
            f"{root / 'adapter_config.json'}: peft_type {config.kind!r} cannot be merged: {reason}",
            hint=UNMERGED,
        )
    adapter = read_adapter(root, config, weight, tuple(files))
    if not adapter.keys:
        raise InputRefused(
            f"{adapter.file} has no tensors", hint="the adapter was saved empty; export it again"
        )
    return adapter


def _claims(view: AdapterView) -> tuple[Sequence[Claim], tuple[str, ...]]:
    """Return an adapter's claims, and findings."""
    modules = {name.removesuffix(".weight") for name in view.sources}
    modules |= {plain_key(key).rsplit(".", parts)[0] for key in view.keys for parts in (1, 2)}
    check_peft_patterns(view.path, sorted(modules))
    with limit_matching(view.path, len(view.keys)):
        kept, findings = without_left_out(view)
        claims, lacking = claims_of(kept), ", ".join(unmatched_parameters(kept))
    if lacking:
        text = "adapter_config.json targets parameters that the base does not have"
        findings = (*findings, f"{view.path.name}: {text}: {lacking}")
    return claims, findings


def _findings(
    adapters: Sequence[AdapterView], config: Mapping[str, JsonValue], choice: str
) -> Iterator[str]:
    """Yield what is odd about the adapters' configurations, and the bases that they name."""
    for adapter in adapters:
        for name in adapter.config.unknown:
            yield (
                f"{adapter.path.name}: adapter_config.json sets the unknown field {name}, which is "
                "ignored"
            )
    for adapter in adapters:
        # The name may contradict the base's `model_type`. It is a hub name or a path.
        own, named = str(config.get("model_type", "")), _families(_last(adapter.config.base_model))
        if named and _families(own) and not named & _families(own):
            yield (
                f"{adapter.path.name}: trained on {adapter.config.base_model!r} according to"
                f" adapter_config.json, but the base's model_type is {own}; the shapes fit, but"
                " check that it is the right base"
            )
    rounded = simulates(choice) or config.get("quantization_config")
    for adapter in () if rounded else adapters:
        if "bnb-4bit" in _last(adapter.config.base_model).lower():
            yield (
                f"{adapter.path.name}: trained on {adapter.config.base_model!r}, in 4 bits, and"
                " merged into unrounded weights; compare with quantized_base: simulate-nf4 or"
                " simulate-nf4-double, which round this base as in training, or dequantize, with"
                " that base"
            )


def _written_apart(settings: Mapping[str, JsonValue], apart: Tie | None) -> Iterator[str]:
    if settings:
        counts = ", ".join(f"{n} {value}" for n, value in settings.items() if type(value) is int)
        yield (
            "layer_replication: replicas are written as separate layers; config.json has " + counts
        )
    if apart:
        yield (
            f"config.json ties {apart.head} to {apart.embedding}, but the base has different "
            "weights for them, so transformers does not tie them: tie_word_embeddings is set to "
            "false"
        )


def _last(name: str) -> str:
    return name.rstrip("/\\").replace("\\", "/").rpartition("/")[2]


def _families(name: str) -> frozenset[str]:
    return frozenset(family for family in _FAMILIES if family in name.lower())


def can_be_virtual(plan: MergePlan) -> bool:
    """Return whether a merge's rows can be computed as often as they are needed.

    Sums of products, replaced rows and copies take little longer than reading. Other changes need
    whole tensors, and dequantized ones are made as a whole.
    """
    return all(
        output.change is None and isinstance(output.source, StoredTensor)
        for output in plan.outputs.values()
    )
