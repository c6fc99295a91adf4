"""Claims -> outputs: every tensor of the merged checkpoint, file by file.

An adapter's weight scales its whole change: W + Σ weight · (changed - W). So half of a DoRA, a
trained norm or a saved embedding means half of its effect. PEFT scales B·A alone, which for DoRA
also changes the norm.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

from weightsmith.core.errors import InputRefused
from weightsmith.core.values import JsonValue
from weightsmith.merging.base import BaseTensors
from weightsmith.merging.claim import SHOWN, AdapterView, Claim
from weightsmith.merging.combining.changes import AdapterShare, Mixture, combined
from weightsmith.merging.combining.combination import Combination
from weightsmith.merging.outputs import (
    MergedTensor,
    OutputShard,
    StoredTensor,
    TensorSource,
    matrix_columns,
)
from weightsmith.merging.tying import Tie, is_embedding, is_head
from weightsmith.models.tensors import unsupported

MERGEABLE = frozenset({"BF16", "F16", "F32"})
_FLOATS = MERGEABLE | {"F64"}


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
            f"the adapter changes {tie.embedding} and its tied head differently, but the name of "
            "this model's head is unknown",
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
    """Return the output of a tensor changed by a single adapter at weight 1."""
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
        if doubled or not legal:
            what = doubled[:SHOWN] or sorted({claim.module for claim in claims})
            raise InputRefused(
                f"{path} changes {name} twice: {', '.join(what)}",
                hint="two of its modules match the same base tensor; export one adapter per folder",
            )
