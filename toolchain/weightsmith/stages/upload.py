"""A model's files and its card -> one commit on a hub."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from weightsmith.errors import EnvironmentFailure, UsageError
from weightsmith.outcome import Outcome, Timer
from weightsmith.ports import Hub, HubContent
from weightsmith.tools import Tools
from weightsmith.values import FileEntry, Tree, Uploaded

SCHEME = "hf://"
CARD = "README.md"
_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_GIT = 40
"""Digits of git's ids; a digest has 64."""
_OF_THE_HUB = frozenset({".gitattributes"})
"""Files that the hub makes itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HubPlace:
    """A repository on a hub, and how to publish there."""

    repository: str
    """`owner/name`."""
    force: bool = False
    """Replace what is there."""
    public: bool = False
    """Whether everybody may read a new repository; one that exists keeps its visibility."""

    @property
    def reference(self) -> str:
        """Its name as users write it."""
        return f"{SCHEME}{self.repository}"


def repository_of(text: str) -> str:
    """Return the `owner/name` of `hf://owner/name`; raises UsageError for anything else."""
    name = text.removeprefix(SCHEME)
    if not _NAME.fullmatch(name) or ".." in name or "--" in name:
        raise UsageError(
            f"{text}: not a repository on a hub", hint="give it as hf://OWNER/NAME, without a path"
        )
    return name


def check_place(place: HubPlace, hub: Hub) -> HubContent | None:
    """Return what the repository holds, None if it does not exist; raises as `Hub.check` does."""
    return hub.check(place.repository)


def upload(tree: Tree, card: str, place: HubPlace, version: str, tools: Tools) -> Outcome[Uploaded]:
    """Publish a model's files and its card on a hub, in one commit that holds nothing else.

    Files that the repository has are not sent again, and nothing is committed if it has them all.
    Raises UsageError if it holds other files and `force` is not given, EnvironmentFailure if the
    hub refuses the upload or cannot be reached.
    """
    timer = Timer("upload", place.reference, tools)
    began = tools.clock()
    entries = {entry.path: entry for entry in tree.files if entry.path != CARD}
    held = check_place(place, tools.hub)
    missing = _missing(tree, entries, card, held)
    stale = sorted({*(held.files if held else {})} - {*entries, CARD} - _OF_THE_HUB)
    if held and not missing and not stale:
        done = Uploaded(reference=place.reference, digest=held.commit)
        return timer.done(done, cached=True)
    if held and not place.force and set(held.files) - _OF_THE_HUB:
        other = next(iter(stale or [name for name in missing if name in held.files]), CARD)
        raise UsageError(
            f"{place.reference} already holds other files, such as {other}",
            hint="choose another name, or replace them with --force; earlier commits stay",
        )
    sizes = [len(x) if isinstance(x, bytes) else x.stat().st_size for x in missing.values()]
    tools.progress.note(f"uploading {len(sizes)} files, {sum(sizes) / 1e6:,.1f} MB")
    content = held or tools.hub.create(place.repository, public=place.public)
    commit = tools.hub.commit(place.repository, content.commit, missing, stale, _message(version))
    after = tools.hub.check(place.repository)
    if lost := _missing(tree, entries, card, after):
        raise EnvironmentFailure(
            f"{place.reference}: the commit lacks {', '.join(sorted(lost)[:3])}",
            hint="somebody else may have written to it: look at its history, then push again",
        )
    done = Uploaded(
        reference=place.reference,
        digest=commit,
        uploaded_bytes=sum(sizes),
        seconds=tools.clock() - began,
    )
    return timer.done(done, cached=False)


def _missing(
    tree: Tree, entries: Mapping[str, FileEntry], card: str, held: HubContent | None
) -> dict[str, Path | bytes]:
    """Return the files that a repository does not have, the card first."""
    there = held.files if held else {}
    data = card.encode()
    found: dict[str, Path | bytes] = {}
    if there.get(CARD) not in (_git_id(data), hashlib.sha256(data).hexdigest()):
        found[CARD] = data
    for path, entry in entries.items():
        known, place = there.get(path, ""), tree.path(path)
        # A large file is known by its digest, so only small ones are read.
        if len(known) == _GIT:
            same = known == _git_id(place.read_bytes())
        else:
            same = known == entry.digest.hex
        if not same:
            found[path] = place
    return found


def _git_id(data: bytes) -> str:
    """Return git's id of a file: https://git-scm.com/book/en/v2/Git-Internals-Git-Objects."""
    head = b"blob %d\0" % len(data)
    return hashlib.sha1(head + data, usedforsecurity=False).hexdigest()


def _message(version: str) -> str:
    return f"Upload {version} with weightsmith" if version else "Upload with weightsmith"
