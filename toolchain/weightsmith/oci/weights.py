"""A model's files as layers: which of them get one of their own, and which share one."""

from __future__ import annotations

from collections.abc import Mapping

from weightsmith.oci import tar
from weightsmith.oci.image import MOST_LAYERS
from weightsmith.oci.layers import Member, Memo, TarLayer
from weightsmith.values import Pieces, Tree

_WEIGHTS = (".safetensors", ".gguf")
"""Endings of files that get a layer of their own, so that a changed tokenizer sends no weights."""
OWN_LAYER = 32 << 20
"""Bytes from which any other file gets one, too; 32 MiB."""
_MOST_LAYERS = 64
"""Above this, neighbours share layers: engines hold at most 125, and the base needs its own."""


def most_beside(base_layers: int) -> int:
    """Return how many layers of weights go with a base; small files and settings need one each."""
    return max(1, min(_MOST_LAYERS, MOST_LAYERS - base_layers - 2))


def weight_layers(
    tree: Tree,
    prefix: str = "/models",
    *,
    epoch: int | None = None,
    memo: Memo | None = None,
    own_layer: int = OWN_LAYER,
    most: int = _MOST_LAYERS,
    largest: int = 0,
    contents: Mapping[str, Pieces] | None = None,
) -> tuple[TarLayer, ...]:
    """Return the tree as layers: each file of weights alone, small other ones together, sorted.

    Modes on disk do not count: weights are data, 0644 wherever they were kept. Files that share
    a layer stay below `largest` bytes together, where that is given. `contents` are files that
    are not on disk.
    """
    when = tar.source_date_epoch() if epoch is None else epoch
    large: list[Member] = []
    small: list[Member] = []
    for entry in sorted(tree.files, key=lambda entry: entry.path):
        place = f"{prefix.rstrip('/')}/{entry.path}"
        source = (contents or {}).get(entry.path, tree.path(entry.path))
        member = Member(place, entry.size, 0o644, source, entry.digest)
        alone = entry.path.endswith(_WEIGHTS) or entry.size >= own_layer
        (large if alone else small).append(member)
    together = max(1, -(-len(large) // most))
    groups = [large[start : start + together] for start in range(0, len(large), together)]
    return tuple(
        TarLayer(members=tuple(part), epoch=when, memo=memo)
        for group in [*groups, small]
        for part in _below(group, largest)
        if part
    )


def _below(group: list[Member], largest: int) -> list[list[Member]]:
    """Cut a group of files where its layer would become larger than `largest`; 0 never does."""
    parts: list[list[Member]] = [[]]
    used = 0
    for member in group:
        # Headers, padding and folders: an upper bound that no path of an image exceeds.
        need = member.size + 8 * tar.BLOCK
        if largest and parts[-1] and used + need > largest:
            parts.append([])
            used = 0
        parts[-1].append(member)
        used += need
    return parts
