"""Groups files into layers: a model's, of which large ones get their own, and an engine's.

An engine's are a program's own, or a whole root file system's. Their digests are in the store under
the digest of the tree; its 19,000 files are read when a layer is read, and verified then.
Describing them in every build took half of the CPU time of one without changes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from weightsmith.core.values import Pieces, Stream, Tree
from weightsmith.oci import tar
from weightsmith.oci.image import MOST_LAYERS
from weightsmith.oci.layers import Member, Memo, TarLayer

_WEIGHTS = (".safetensors", ".gguf")
"""Extensions of files with a layer of their own: a changed tokenizer uploads no weights again."""
OWN_LAYER = 32 << 20
"""Bytes from which any other file gets its own layer; 32 MiB."""
_MOST_LAYERS = 64
"""Above this, neighbours share layers: engines support at most 125, including the base's."""
_FASTEST_LAYER = 500 * 10**6
"""Bytes: a model of 4 GB then has eight layers, and more make a pull hardly faster."""
_SPLIT_LAYERS = 32
"""Layers of a large model if all are full; even if all are half full, `_MOST_LAYERS` suffice."""
LARGEST_ANYWHERE = 10**10
"""Bytes that the strictest registries accept in a layer (`limits.py`). An image does not depend on
where it is pushed, so `auto` keeps to it everywhere."""

GROUPING = 1
"""Increase it if `root_layers` makes different layers from the same files and rules."""
PACKAGE = re.compile(r"usr/local/lib/python[^/]+/dist-packages/([^/]+)/")
ACCOUNTS = {
    "etc/passwd": "root:x:0:0:root:/:/sbin/nologin\nmodel:x:65532:65532:model:/tmp:/sbin/nologin\n",
    "etc/group": "root:x:0:\nmodel:x:65532:\n",
}
PROGRAM_FOLDER = "app/"

Mode = Callable[[str], int]
"""A file's path -> its mode."""


def fastest_layer(weight_bytes: int) -> int:
    """Return the size in bytes above which a weights file is split, so that nodes pull it faster.

    Source: benchmarks/README.md, "Pulls".
    """
    return min(max(_FASTEST_LAYER, -(-weight_bytes // _SPLIT_LAYERS)), LARGEST_ANYWHERE)


def max_weight_layers(base_layers: int) -> int:
    """Return how many weight layers fit on a base; small files and settings need one each."""
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
    contents: Mapping[str, Pieces | Stream] | None = None,
    order: Mapping[str, int] | None = None,
) -> tuple[TarLayer, ...]:
    """Return the tree as layers: each weights file alone, small other files together, sorted.

    Files with a higher number in `order` are above others: a node that has a similar image keeps
    the layers up to the first that differs (Docker), or what it unpacked of them (containerd).

    Modes on disk are ignored: all files become 0644. Files that share a layer have at most
    `largest` bytes together, if given. `contents` are files that are not on disk as such.
    """
    when = tar.source_date_epoch() if epoch is None else epoch
    large: list[Member] = []
    small: list[Member] = []
    for entry in sorted(tree.files, key=lambda one: ((order or {}).get(one.path, 0), one.path)):
        path = f"{prefix.rstrip('/')}/{entry.path}"
        pieces = (contents or {}).get(entry.path)
        source = tree.source(entry.path) if pieces is None else pieces
        member = Member(path, entry.size, 0o644, source, entry.digest)
        alone = entry.path.endswith(_WEIGHTS) or entry.size >= own_layer
        (large if alone else small).append(member)
    together = max(1, -(-len(large) // most))
    groups = [large[start : start + together] for start in range(0, len(large), together)]
    parts = [part for group in groups for part in _below(group, largest)]
    if len(parts) > most:  # three shards of 4 GB are too large for a layer, two are not
        parts = _below(large, largest)
    return tuple(
        TarLayer(members=tuple(part), epoch=when, memo=memo)
        for part in [*parts, *_below(small, largest)]
        if part
    )


def _below(group: list[Member], largest: int) -> list[list[Member]]:
    """Split a group of files so that no layer exceeds `largest` bytes; 0 for no limit."""
    parts: list[list[Member]] = [[]]
    used = 0
    for member in group:
        # Headers, padding and folders: an upper bound for any path in an image.
        need = member.size + 8 * tar.BLOCK
        if largest and parts[-1] and used + need > largest:
            parts.append([])
            used = 0
        parts[-1].append(member)
        used += need
    return parts


def program_layers(tree: Tree, *, epoch: int, memo: Memo | None = None) -> tuple[TarLayer, ...]:
    """Return the layer of static programs, which can all be executed."""
    members = (*_members(tree, PROGRAM_FOLDER, lambda _: 0o755), *_accounts())
    return (TarLayer(members=members, epoch=epoch, memo=memo),)


def root_layers(
    tree: Tree, mode: Mode, *, epoch: int, memo: Memo | None = None
) -> tuple[TarLayer, ...]:
    """Return one layer per large package, so that a new version changes only its own layer."""
    groups: dict[str, list[Member]] = {}
    for member in _members(tree, "", mode):
        found = PACKAGE.match(member.path)
        groups.setdefault(found[1] if found else "", []).append(member)
    large = {n for n, group in groups.items() if n and sum(m.size for m in group) >= OWN_LAYER}
    rest = [member for name, group in groups.items() if name not in large for member in group]
    return (
        TarLayer(members=(*rest, *_accounts()), epoch=epoch, memo=memo, shared=("tmp",)),
        *(TarLayer(members=tuple(groups[n]), epoch=epoch, memo=memo) for n in sorted(large)),
    )


def _accounts() -> tuple[Member, ...]:
    return tuple(Member.of_bytes(path, text.encode()) for path, text in ACCOUNTS.items())


def _members(tree: Tree, prefix: str, mode: Mode) -> tuple[Member, ...]:
    return tuple(
        Member(prefix + f.path, f.size, mode(f.path), tree.source(f.path), f.digest)
        for f in tree.files
    )
