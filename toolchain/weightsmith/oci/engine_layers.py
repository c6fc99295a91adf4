"""Groups an engine's files into layers: a program's own, or a whole root file system's.

Their digests are in the store under the digest of the tree; its 19,000 files are read when a layer
is read, and verified then. Describing them in every build took half of the CPU time of one without
changes.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from weightsmith.core.values import Tree
from weightsmith.oci.layers import Member, Memo, TarLayer
from weightsmith.oci.weights import OWN_LAYER

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
