"""Claims -> outputs: every tensor of the merged checkpoint, shard by shard."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from toolchain.checkpoints.safetensors import CheckpointIndex
from toolchain.errors import InputRefused
from toolchain.merging.families.family import SHOWN, AdapterView, Claim
from toolchain.merging.mixture import Mixture, Share
from toolchain.merging.outputs import Output, OutputShard, Source, matrix_columns

MERGEABLE = frozenset({"BF16", "F16", "F32"})
_FLOATS = MERGEABLE | {"F64"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Composition:
    """The files to write, what config.json says differently, and what is worth knowing."""

    shards: tuple[OutputShard, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    findings: list[str] = field(default_factory=list)


def compose(
    index: CheckpointIndex,
    sources: Mapping[str, Source],
    views: Sequence[AdapterView],
    claims: Sequence[Sequence[Claim]],
    dtype: str,
) -> Composition:
    """Return every output, in the order of the base's bytes; `claims[i]` are those of `views[i]`.

    Raises InputRefused where claims contradict each other or the base's type cannot hold them.
    """
    shares: dict[str, list[Share]] = defaultdict(list)
    for view, some in zip(views, claims, strict=True):
        for claim in some:
            shares[claim.target].append(Share(claim=claim, weight=view.weight, path=view.path))
    shards = [
        OutputShard(
            name=shard.path.name,
            outputs=tuple(
                compose_output(info.name, sources[info.name], shares[info.name], dtype)
                for info in shard.tensors
            ),
        )
        for shard in index.shards
    ]
    return Composition(shards=tuple(shards))


def out_dtype(source: Source, dtype: str) -> str:
    """Return the type that a base tensor is written in."""
    return dtype if dtype != "auto" and source.dtype in _FLOATS else source.dtype


def compose_output(name: str, source: Source, shares: Sequence[Share], dtype: str) -> Output:
    """Return one output: the source with all that is claimed to change it.

    Low-rank terms alone are summed exactly; a tensor or rows that one adapter replaces are taken
    as they are; everything else is W + Σ weight · (changed - W) in float64 (`Mixture`).
    """
    out, columns = out_dtype(source, dtype), matrix_columns(source.shape)
    plain = Output(name=name, dtype=out, shape=source.shape, source=source, columns=columns)
    if not shares:
        return plain
    if source.dtype not in MERGEABLE:
        raise InputRefused(
            f"the base's {name} is of type {source.dtype}",
            hint="adapters can be merged onto bfloat16, float16 and float32 weights",
        )
    claims = [share.claim for share in shares]
    columns = next((claim.columns for claim in claims if claim.columns), columns)
    _check_overlaps(shares)
    if all(claim.terms for claim in claims):
        terms = tuple(term for claim in claims for term in claim.terms)
        return _with(plain, columns, terms=terms)
    if len({share.path for share in shares}) == 1 and shares[0].weight == 1.0:
        return _of_one(plain, columns, claims)
    return _with(plain, columns, change=Mixture(shares=tuple(shares)))


def _of_one(plain: Output, columns: int, claims: Sequence[Claim]) -> Output:
    """Return what a single adapter at weight 1 makes of a tensor."""
    replacement = next((claim.replacement for claim in claims if claim.replacement), None)
    if replacement is not None:
        terms = tuple(term for claim in claims for term in claim.terms)
        return Output(
            name=plain.name,
            dtype=plain.dtype,
            shape=replacement.shape,
            source=replacement,
            columns=columns,
            terms=terms,
            kind="merged" if terms else "replaced",
        )
    (claim,) = claims
    if claim.patch:
        return _with(plain, columns, patches=(claim.patch,))
    return _with(plain, columns, change=claim.change)


def _with(plain: Output, columns: int, **changed: Any) -> Output:
    return Output(
        name=plain.name,
        dtype=plain.dtype,
        shape=plain.shape,
        source=plain.source,
        columns=columns,
        kind="merged",
        **changed,
    )


def _check_overlaps(shares: Sequence[Share]) -> None:
    """Refuse an adapter that changes the same rows twice: its modules mean the same tensor."""
    for path in {share.path for share in shares}:
        mine = [share.claim for share in shares if share.path == path]
        kinds = [claim.kind for claim in mine if not claim.terms]
        spans = sorted(
            (term.first, term.first + term.shape[0], claim.module)
            for claim in mine
            for term in claim.terms
        )
        modules = [
            f"{one[2]} and {other[2]}"
            for one, other in pairwise(spans)
            if other[0] < one[1] and one[2] != other[2]
        ]
        legal = kinds in ([], ["replacement"]) or (len(mine) == 1)
        if modules or not legal:
            what = modules[:SHOWN] or sorted({claim.module for claim in mine})
            raise InputRefused(
                f"{path} changes {mine[0].target} twice: {', '.join(what)}",
                hint="two of its modules mean the same base tensor; export one adapter per folder",
            )
