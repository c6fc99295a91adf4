"""Whether to merge the adapters or to serve them unmerged, and the reasons for either."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from weightsmith.core.values import Json, JsonValue

_OFTEN = 3
"""Different adapters under one name within a week: it is still being trained."""
_OPPOSED = -0.05
"""Cosine of two adapters' changes below which each undoes a part of the other."""


def advise(
    *, adapters: int, packed: bool, changes: int, conflicts: Sequence[Mapping[str, Json]]
) -> Mapping[str, JsonValue]:
    """Return `merge` (true, false, or null without adapters) and `why`, sentences for people.

    `adapters` of the recipe; `packed`: a target is quantized; `changes`: different adapters built
    under the recipe's name within a week; `conflicts`: the merge's own measurement, a mapping with
    `adapters` and `cosine` for each two, empty before it is done.
    """
    if not adapters:
        return {"merge": None, "why": ["there is no adapter: the base is served as it is"]}
    merged: list[str] = []
    apart = [
        f"{' and '.join(map(str, pair['adapters']))} work against each other (cosine"
        f" {float(pair['cosine']):.2f}): merging weakens both"
        for pair in conflicts
        if float(pair["cosine"]) < _OPPOSED
    ]
    if changes >= _OFTEN:
        apart.append(
            f"the adapters changed {changes} times within a week: unmerged, an update moves"
            " megabytes; merged, it moves all weights"
        )
    if packed:
        merged.append("a target is quantized: quantizers take one plain checkpoint")
    if adapters == 1:
        merged.append("one adapter: once merged, it costs nothing per request")
    elif not conflicts:
        merged.append(
            f"{adapters} adapters for one model: if each has clients of its own, serve them"
            " unmerged with one base (vllm-lora) instead"
        )
    else:
        merged.append("the adapters do not work against each other, as measured")
    keep = bool(apart) and not packed
    return {"merge": not keep, "why": [*apart, *merged] if keep else [*merged, *apart]}
