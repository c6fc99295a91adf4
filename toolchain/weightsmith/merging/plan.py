"""Plan a merge from headers and configurations only.

A plan is a list of output tensors, each with its source (a tensor of the base, of an adapter, or
one decoded from several) and its changes. So one kernel handles linear layers, convolutions,
embeddings, biases and experts, and the writer knows no kind of adapter. A map from base tensors to
terms could not replace, add or rename tensors.

An adapter's weight scales its whole change: W + Σ weight · (changed - W). So half of a DoRA, a
trained norm or a saved embedding means half of its effect. PEFT scales B·A alone, which for DoRA
also changes the norm.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

from weightsmith.core.errors import InputRefused, UsageError
from weightsmith.core.merge_options import Merge
from weightsmith.core.safe_parse import read_json
from weightsmith.core.values import JsonValue
from weightsmith.merging.adapter_config import REFUSED, UNMERGED, read_adapter_config
from weightsmith.merging.base import (
    STALE,
    BaseTensors,
    BaseView,
    ComputedSource,
    base_view,
    replicate,
    same_layers,
    simulates,
)
from weightsmith.merging.claim import SHOWN, AdapterView, Claim, read_adapter
from weightsmith.merging.claims import (
    claims_of,
    old_head,
    prefix_below_head,
    task_settings,
    unmatched_modules,
    unmatched_parameters,
    without_left_out,
)
from weightsmith.merging.combining.changes import AdapterShare, Mixture, combined
from weightsmith.merging.combining.combination import Combination
from weightsmith.merging.families import families
from weightsmith.merging.names import BaseNames, loaded_names, plain_key, split_names
from weightsmith.merging.outputs import (
    MergedTensor,
    OutputShard,
    StoredTensor,
    TensorSource,
    matrix_columns,
)
from weightsmith.merging.tying import Tie, find_tie, is_embedding, is_head, stored_apart
from weightsmith.models.folder import check_adapter_folder, check_model_folder
from weightsmith.models.peft_patterns import check_peft_patterns, limit_matching
from weightsmith.models.predicting import predicting_tensors
from weightsmith.models.safetensors import CheckpointIndex, open_checkpoint
from weightsmith.models.tensors import unsupported

DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
KINDS = ("merged", "copied", "replaced")
"""Kinds of output tensors."""
MERGEABLE = frozenset({"BF16", "F16", "F32"})
_FLOATS = MERGEABLE | {"F64"}
START_BYTES = 100 << 20
"""Resident memory of Python with numpy imported, rounded up."""
BLOCK_BYTES = 24 << 20
"""Buffers per worker."""
_PLAIN = Merge()
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


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedBase:
    """A base whose headers and configuration have been read."""

    files: tuple[str, ...]
    index: CheckpointIndex
    view: BaseView


def open_base(base: Path, quantized_base: str) -> OpenedBase:
    """Read a base under the choice for quantized ones; raises InputRefused as `make_plan` does."""
    files, index = check_model_folder(base), open_checkpoint(base)
    view = base_view(index, read_json(base / "config.json"), quantized_base)
    return OpenedBase(files=tuple(files), index=index, view=view)


def make_plan(
    base: Path, adapters: Sequence[tuple[Path, float]], options: Merge = _PLAIN
) -> MergePlan:
    """Return the plan of a merge into the base of a folder, as `plan_onto` does."""
    return plan_onto(open_base(base, options.quantized_base), adapters, options)


def plan_onto(
    base: OpenedBase, adapters: Sequence[tuple[Path, float]], options: Merge
) -> MergePlan:
    """Return the plan, from the headers and configurations of base and adapters.

    Every adapter key is used exactly once. Raises InputRefused for unused, missing, ambiguous or
    quantized tensors and wrong shapes, UsageError for an invalid weight.
    """
    combination, dtype = Combination.of(options), DTYPES.get(options.dtype, "auto")
    for root, weight in adapters:
        if not math.isfinite(weight):
            raise UsageError(f"invalid weight {weight} for {root}", hint="give a finite number")
    if combination.space == "factors" and len(adapters) == 1:
        combination = Combination(method="linear", space="factors")  # as in PEFT
    based = base.view
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
        tensors, settings = replicate(tensors, config, layers)
    loaded = loaded_names(config, tensors.sources)
    tie = find_tie(config, tensors.sources, loaded)
    apart = tie if tie and read and stored_apart(tie, tensors.sources) else None
    tie = None if apart else tie
    further = frozenset(predicting_tensors(config, tensors.sources))
    names = BaseNames(tensors.sources, loaded, split_names(config, tensors.sources), further)
    onto = partial(
        replace, names=names, sources=tensors.sources, base_config=config, tie=tie, apart=apart
    )
    views = tuple(onto(adapter, index=number) for number, adapter in enumerate(read))
    claimed = [_claims(view) for view in views]
    claims = [claims for claims, _ in claimed]
    shards, changed, notes = compose(tensors, tie, views, claims, dtype, combination)
    if prefix := next(filter(None, map(prefix_below_head, claims)), ""):
        shards = _below(prefix, shards, tensors.sources)
    dropped = frozenset[str]().union(*(old_head(config, some, tensors.sources) for some in claims))
    shards = tuple(
        replace(shard, outputs=kept)
        for shard in shards
        if (kept := tuple(one for one in shard.outputs if one.name not in dropped))
    )
    return MergePlan(
        base=base.index,
        base_files=tuple(name for name in base.files if not (based.dropped and name in STALE)),
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
            *_findings(views, config, options.quantized_base),
            *(text for _, texts in claimed for text in texts),
            *notes,
            *_written_apart(settings, apart),
        ),
    )


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
    modules = {name.removesuffix(".weight") for name in view.sources}
    modules |= {plain_key(key).rsplit(".", parts)[0] for key in view.keys for parts in (1, 2)}
    check_peft_patterns(view.path, sorted(modules))
    with limit_matching(view.path, len(view.keys)):
        kept, findings = without_left_out(view)
        claims = claims_of(kept)
        unmatched = {
            "targets parameters": unmatched_parameters(kept),
            "saves modules": unmatched_modules(kept),
        }
    for does, names in unmatched.items():
        if names:
            text = f"adapter_config.json {does} that the base does not have: {', '.join(names)}"
            findings = (*findings, f"{view.path.name}: {text}")
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


def compose(
    base: BaseTensors,
    tie: Tie | None,
    views: Sequence[AdapterView],
    claims: Sequence[Sequence[Claim]],
    dtype: str,
    combination: Combination,
) -> tuple[tuple[OutputShard, ...], dict[str, JsonValue], list[str]]:
    """Return the files to write, changed settings of config.json, and findings.

    Outputs are in the base's order; `claims[i]` are those of `views[i]`.
    Raises InputRefused if claims contradict each other or the base's dtype is not supported.
    """
    shares: dict[str, list[AdapterShare]] = defaultdict(list)
    for view, some in zip(views, claims, strict=True):
        for claim in some:
            if claim.target:
                share = AdapterShare(
                    claim=claim, weight=view.weight, adapter=view.index, path=view.path
                )
                shares[claim.target].append(share)
    untied = _untie(tie, shares)
    outputs = {
        name: compose_output(name, source, shares[name], dtype, combination)
        for name, source in base.sources.items()
    }
    layout = {shard: list(names) for shard, names in base.layout}
    if tie and untied:
        source = base.sources[tie.embedding]
        # Without a change of its own, the head is a copy of the original shared weight.
        outputs[tie.head] = compose_output(tie.head, source, shares[tie.head], dtype, combination)
        home = next(names for names in layout.values() if tie.embedding in names)
        place = home.index(tie.embedding) + 1
        if tie.head not in base.sources:
            home.insert(place, tie.head)
        for name, shared in tie.also:
            outputs[name] = replace(outputs[shared], name=name)
            home.insert(place, name)
    for name, own_shares in shares.items():
        if any(share.claim.new for share in own_shares):
            layout[base.layout[-1][0]].append(name)
            outputs[name] = _added(name, own_shares, base, dtype)
    note = untied
    if tie and not untied and shares.get(tie.embedding):
        note = f"still tied: {tie.embedding} changes for both the embedding and the head"
    settings: dict[str, JsonValue] = {"tie_word_embeddings": False} if untied else {}
    modules = [name.removesuffix(".weight") for name in outputs]
    changed = [name.removesuffix(".weight") for name, some in shares.items() if some]
    both = any(map(is_head, modules)) and any(map(is_embedding, modules))
    if tie is None and both and any(is_head(name) or is_embedding(name) for name in changed):
        # Set explicitly, for classes that tie by default.
        settings["tie_word_embeddings"] = False
    shards = tuple(
        OutputShard(name=shard, outputs=tuple(outputs[name] for name in names))
        for shard, names in layout.items()
    )
    return shards, settings | _vocabulary(base, outputs, tie), [note] if note else []


def _below(
    prefix: str, shards: Sequence[OutputShard], names: Collection[str]
) -> tuple[OutputShard, ...]:
    """Return shards with a prefix before these names, which are the base's and no head's."""
    return tuple(
        replace(
            shard,
            outputs=tuple(
                replace(one, name=prefix + one.name) if one.name in names else one
                for one in shard.outputs
            ),
        )
        for shard in shards
    )


def _untie(tie: Tie | None, shares: dict[str, list[AdapterShare]]) -> str:
    """Give the head its own shares if it changes differently from the embedding; return a finding.

    Changes of both apply to the shared weight, and to the head's own copy if the base has one.
    """
    if tie is None:
        return ""
    shared = [share for share in shares[tie.embedding] if share.claim.both]
    alone = [share for share in shares[tie.embedding] if not share.claim.both]
    own = shares[tie.head]
    if not alone and not own:
        shares[tie.head] = list(shared)
        return ""
    if not tie.known:
        raise InputRefused(
            f"the adapter changes {tie.embedding} and its tied head differently, but how this "
            "model's head is untied is unknown",
            hint="serve it unmerged, or train embedding and head together (ensure_weight_tying)",
        )
    shares[tie.head] = shared + own
    modules = sorted({share.claim.module for share in (*alone, *own)})
    return (
        f"untied: the adapter changes only {' and '.join(modules)}, so {tie.head} is written "
        f"in addition to {tie.embedding}, and tie_word_embeddings is set to false"
    )


def compose_output(
    name: str,
    source: TensorSource,
    shares: Sequence[AdapterShare],
    dtype: str,
    combination: Combination,
) -> MergedTensor:
    """Return one output: the source with all shares applied.

    Low-rank terms are summed exactly; a tensor or rows replaced by a single adapter are copied;
    everything else is W + Σ weight · (changed - W) in float64 (`Mixture`), or the method's
    combination of these deltas (`Combined`).
    """
    out = dtype if dtype != "auto" and source.dtype in _FLOATS else source.dtype
    columns = matrix_columns(source.shape)
    plain = MergedTensor(name=name, dtype=out, shape=source.shape, source=source, columns=columns)
    if not shares:
        return plain
    claims = [share.claim for share in shares]
    first = claims[0].replacement
    # One adapter's tensor of the same dtype replaces it without computation.
    copied = first and first.dtype == source.dtype and shares[0].weight == 1 and not claims[1:]
    if source.dtype not in MERGEABLE and not copied:
        raise unsupported(f"the base's {name}", source.dtype)
    plain = replace(plain, columns=next((c.columns for c in claims if c.columns), columns))
    _check_overlaps(name, shares)
    if combination.sums and all(claim.terms for claim in claims):
        terms = tuple(term for claim in claims for term in claim.terms)
        return replace(plain, terms=terms, kind="merged")
    alone = len({share.adapter for share in shares}) == 1 and shares[0].weight == 1.0
    resized = [c.replacement for c in claims if c.replacement]
    # A tensor or rows replaced by a single adapter are not a delta to vote on or prune; a copy of
    # the base's tensor, beside the factors that change it, makes them no replacement.
    replaces = all(claim.replacement or claim.patch for claim in claims)
    replaces = replaces or any(stored.shape != source.shape for stored in resized)
    if alone and (combination.sums or replaces):
        return _single(plain, claims)
    # All adapters have the same tensor: the base's rows and additional ones.
    if (
        len(resized) == len(claims)
        and isinstance(source, StoredTensor)
        and resized[0].shape[0] > source.shape[0]
        and resized[0].begins_with(source)
        and all(map(resized[0].same_bytes, resized[1:]))
    ):
        return replace(plain, source=resized[0], shape=resized[0].shape, kind="replaced")
    if any(stored.shape != source.shape for stored in resized):
        what = f"an adapter resizes {name} from {list(source.shape)} to {list(resized[0].shape)}, "
        if len({share.adapter for share in shares}) == 1:
            raise InputRefused(
                f"{what}and it has weight {shares[0].weight:g}: the base has no rows to weigh the "
                "new ones against",
                hint="merge it at weight 1, as it was trained",
            )
        raise InputRefused(
            f"{what}which cannot be combined with other adapters",
            hint="merge it alone and at weight 1; then merge the others onto the result",
        )
    if combination.sums:
        return replace(plain, change=Mixture(shares=tuple(shares)), kind="merged")
    return replace(plain, change=combined(name, shares, combination), kind="merged")


def _added(
    name: str, shares: Sequence[AdapterShare], base: BaseTensors, dtype: str
) -> MergedTensor:
    """Return the output of a new tensor, in the dtype of the base's matrices."""
    (share,) = shares
    stored = share.claim.replacement
    assert stored is not None  # noqa: S101 - new tensors come from an adapter
    kinds = [source.dtype for source in base.sources.values() if len(source.shape) == 2]
    usual = next((kind for kind in kinds if kind in MERGEABLE), stored.dtype)
    return MergedTensor(
        name=name,
        dtype=usual if dtype == "auto" else dtype,
        shape=stored.shape,
        source=stored,
        columns=matrix_columns(stored.shape),
        kind="replaced",
    )


def _single(plain: MergedTensor, claims: Sequence[Claim]) -> MergedTensor:
    made, kind = plain, "merged"
    replacement = next((claim.replacement for claim in claims if claim.replacement), None)
    if replacement is not None:
        made = replace(made, source=replacement, shape=replacement.shape)
        kind = "merged" if len(claims) > 1 else "replaced"
    terms = tuple(term for claim in claims for term in claim.terms)
    patches = tuple(claim.patch for claim in claims if claim.patch)
    for patch in patches:
        if max(patch.places, default=0) >= made.rows:
            raise InputRefused(
                f"the adapter trains token {max(patch.places)}; {plain.name} has {made.rows} rows",
                hint="resize the base's vocabulary as in training, or export the adapter with "
                "save_embedding_layers=True",
            )
    change = next((claim.change for claim in claims if claim.change), None)
    return replace(made, terms=terms, patches=patches, change=change, kind=kind)


def _vocabulary(
    base: BaseTensors, outputs: Mapping[str, MergedTensor], tie: Tie | None
) -> dict[str, JsonValue]:
    """Return the new `vocab_size` if embeddings and heads are resized alike."""
    rows: dict[str, tuple[int, int]] = {}
    for name, output in outputs.items():
        module = name.removesuffix(".weight")
        if (is_embedding(module) or is_head(module)) and output.shape:
            source = base.sources.get(name) or base.sources[tie.embedding if tie else name]
            rows[name] = source.shape[0], output.shape[0]
    words = {before for before, after in rows.values() if before != after}
    # Layers of another size only have such a name.
    sizes = {name: after for name, (before, after) in rows.items() if before in words}
    if not sizes:
        return {}
    if len(set(sizes.values())) > 1:
        resized = [name for name, size in sizes.items() if size != rows[name][0]]
        raise InputRefused(
            f"the adapter resizes only {', '.join(resized)}: "
            "embedding and head would have different numbers of tokens",
            hint="save the resized base and use it as the base, or train the adapter with both in "
            "modules_to_save or in target_modules",
        )
    return {"vocab_size": next(iter(sizes.values()))}


def _check_overlaps(name: str, shares: Sequence[AdapterShare]) -> None:
    """Refuse an adapter with two modules that change the same rows of a tensor."""
    for adapter, path in {share.adapter: share.path for share in shares}.items():
        claims = [share.claim for share in shares if share.adapter == adapter]
        spans = sorted(
            (term.first, term.first + term.shape[0], claim.module)
            for claim in claims
            for term in claim.terms
        )
        doubled = [
            f"{one[2]} and {other[2]}"
            for one, other in pairwise(spans)
            if other[0] < one[1] and one[2] != other[2]
        ]
        kinds = [claim.kind for claim in claims if not claim.terms]
        # Factors or rows may come with a copy of the base tensor that they apply to; PEFT writes
        # one only for embeddings, heads and biases.
        modules = [claim.module for claim in claims]
        wholes = [key for claim in claims if claim.replacement for key in claim.keys]
        copied = name.endswith("bias") or all(".base_layer." in key for key in wholes)
        copied = copied or all(is_embedding(m) or is_head(m) for m in modules)
        legal = len(kinds) == len(set(kinds)) and not ({"change", "patch"} <= set(kinds))
        legal = legal and (not spans or set(kinds) <= {"replacement"})
        legal = legal and (len(claims) == 1 or copied or "replacement" not in kinds)
        if spans and "patch" in kinds and not doubled:
            raise InputRefused(
                f"{path} trains tokens of {name} and has factors on it",
                hint="give the tokens an adapter of their own, without the factors, and merge it "
                "first; then merge the rest, without trainable_token_indices, onto the result",
            )
        if doubled or not legal:
            what = doubled[:SHOWN] or sorted({claim.module for claim in claims})
            raise InputRefused(
                f"{path} changes {name} twice: {', '.join(what)}",
                hint="two of its modules match the same base tensor; export one adapter per folder",
            )
