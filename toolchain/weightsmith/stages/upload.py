"""A model's files, its card and its record -> one commit on a hub."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BufferedReader, BytesIO
from pathlib import Path

from weightsmith.core.errors import EnvironmentFailure, UsageError
from weightsmith.core.ports import AnySigner, Hub, HubContent
from weightsmith.core.values import Artifact, Digest, FileEntry, Published, Tree, Uploaded
from weightsmith.evaluating.build_record import FILE as RECORD
from weightsmith.evaluating.build_record import BuildRecord, read_build
from weightsmith.evaluating.card import RESULTS, benchmark_files, card_of_build
from weightsmith.evaluating.pages import model_card
from weightsmith.evaluating.public_record import file_of, public_record
from weightsmith.provenance.model_signing import SIGNATURE, sign_model, signs_models
from weightsmith.steps.stage_result import StageResult, Timer, unrecorded
from weightsmith.steps.step import ForeseenWeights, Results, Step, UnforeseenStep
from weightsmith.steps.tools import Tools

SCHEME = "hf://"
CARD = "README.md"
_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_GIT = 40
"""Digits of git's ids; a digest has 64."""
_OF_THE_HUB = frozenset({".gitattributes"})
"""Files that the hub makes itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HubDestination:
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """What a commit changes in a repository."""

    held: HubContent | None
    """What is there; None if the repository does not exist."""
    sent: Mapping[str, Path | bytes]
    deleted: tuple[str, ...]

    @property
    def sizes(self) -> dict[str, int]:
        """The bytes of each file that is sent."""
        return {
            name: len(source) if isinstance(source, bytes) else source.stat().st_size
            for name, source in self.sent.items()
        }


def repository_of(text: str) -> str:
    """Return the `owner/name` of `hf://owner/name`; raises UsageError for anything else."""
    name = text.removeprefix(SCHEME)
    if not _NAME.fullmatch(name) or ".." in name or "--" in name:
        raise UsageError(
            f"{text}: not a repository on a hub", hint="give it as hf://OWNER/NAME, without a path"
        )
    return name


def may_refuse(destination: HubDestination, hub: Hub) -> bool:
    """Say whether the repository holds files that only the same model, or `force`, may follow.

    Raises what `Hub.check` raises.
    """
    held = hub.check(destination.repository)
    return bool(held and _own_files(held) and not destination.force)


def check_free(tree: Tree, destination: HubDestination, hub: Hub) -> None:
    """Raise UsageError if the repository holds other files and `force` is not given.

    What its card says is not looked at. Raises what `Hub.check` raises too.
    """
    held, entries = hub.check(destination.repository), _published(tree)
    if held and _own_files(held) and not destination.force:
        _require_free(destination, held, _stale(entries, held), [*_missing(tree, entries, held)])


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """What is said of a model beside its files."""

    card: str
    record: BuildRecord | None
    """For everybody; None of a model that no build made, as far as is known."""


def texts_of(
    tree: Tree, about: About, destination: HubDestination, signer: AnySigner | None
) -> Mapping[str, bytes]:
    """Return what is published beside a model's files: card, record, and the signature of all.

    A key of a kind that signs images alone makes no signature.
    """
    texts = {CARD: about.card.encode()}
    if about.record:
        texts[RECORD] = file_of(about.record)
        texts |= benchmark_files(about.record)
    if signer and signs_models(signer):
        ours = {
            name: FileEntry(path=name, size=len(data), digest=Digest.of(data))
            for name, data in texts.items()
        }
        files = [*(_published(tree) | ours).values()]
        texts[SIGNATURE] = sign_model(destination.repository.rpartition("/")[2], files, signer)
    return texts


def upload(
    tree: Tree, about: About, destination: HubDestination, version: str, tools: Tools
) -> StageResult[Uploaded]:
    """Publish a model's files, card and record on a hub, in one commit that holds nothing else.

    With a key, the files' signature goes with them.

    Files that the repository has are not sent again, and nothing is committed if it has them all.
    Raises UsageError if it holds other files and `force` is not given, EnvironmentFailure if the
    hub refuses the upload or cannot be reached.
    """
    timer = Timer("upload", destination.reference, tools)
    began = tools.clock()
    texts = texts_of(tree, about, destination, tools.signer)
    wanted = changes(tree, texts, destination, tools.hub)
    if wanted.held and not wanted.sent and not wanted.deleted:
        done = Uploaded(reference=destination.reference, digest=wanted.held.commit)
        return timer.done(done, cached=True)
    size = sum(wanted.sizes.values())
    tools.progress.note(f"uploading {len(wanted.sent)} files, {size / 1e6:,.1f} MB")
    content = wanted.held or tools.hub.create(destination.repository, public=destination.public)
    message = f"Upload {version} with weightsmith" if version else "Upload with weightsmith"
    commit = tools.hub.commit(
        destination.repository, content.commit, wanted.sent, wanted.deleted, message
    )
    after = tools.hub.check(destination.repository)
    if lost := {**_missing_texts(texts, after), **_missing(tree, _published(tree), after)}:
        raise EnvironmentFailure(
            f"{destination.reference}: the commit lacks {', '.join(sorted(lost)[:3])}",
            hint="somebody else may have written to it: look at its history, then push again",
        )
    done = Uploaded(
        reference=destination.reference,
        digest=commit,
        uploaded_bytes=size,
        seconds=tools.clock() - began,
    )
    return timer.done(done, cached=False)


def changes(
    tree: Tree, texts: Mapping[str, bytes], destination: HubDestination, hub: Hub
) -> Changes:
    """Return what a commit would change; raises what `check_free` raises. Changes nothing."""
    entries, held = _published(tree), hub.check(destination.repository)
    weights = _missing(tree, entries, held)
    sent = {**_missing_texts(texts, held), **weights}
    stale = _stale(entries, held)
    if held:
        _require_free(destination, held, stale, [*sent])
        if weights or stale:  # others may have measured what was there
            stale += sorted(name for name in {*held.files} - {*texts} if _is_result(name))
        if sent or stale:  # they are about what will not be there
            stale += [name for name in (RECORD, SIGNATURE) if name in {*held.files} - {*texts}]
    return Changes(held=held, sent=sent, deleted=tuple(stale))


def _published(tree: Tree) -> dict[str, FileEntry]:
    """Return a model's files, by path, without those that ours replace."""
    return {entry.path: entry for entry in tree.files if entry.path not in (CARD, RECORD)}


def _own_files(held: HubContent) -> set[str]:
    return set(held.files) - _OF_THE_HUB


def _stale(entries: Mapping[str, FileEntry], held: HubContent | None) -> list[str]:
    others = _own_files(held) - {*entries, CARD, RECORD, SIGNATURE} if held else set()
    return sorted(name for name in others if not _is_result(name))


def _is_result(name: str) -> bool:
    """Say whether a file of a repository is a score on a benchmark, of ours or of others."""
    return name.startswith(RESULTS)


def _require_free(
    destination: HubDestination, held: HubContent, stale: Sequence[str], missing: Sequence[str]
) -> None:
    if destination.force or not _own_files(held) or not (stale or missing):
        return
    other = next(iter(stale or [name for name in missing if name in held.files]), CARD)
    raise UsageError(
        f"{destination.reference} already holds other files, such as {other}",
        hint="choose another name, or replace them with --force; earlier commits stay",
    )


def _missing_texts(texts: Mapping[str, bytes], held: HubContent | None) -> dict[str, Path | bytes]:
    there = held.files if held else {}
    return {
        name: data
        for name, data in texts.items()
        if there.get(name) not in (_git_id(len(data), BytesIO(data)), Digest.of(data).hex)
    }


def _missing(
    tree: Tree, entries: Mapping[str, FileEntry], held: HubContent | None
) -> dict[str, Path | bytes]:
    there = held.files if held else {}
    found: dict[str, Path | bytes] = {}
    for path, entry in entries.items():
        known, said = there.get(path, ""), entry.digest.hex
        if len(known) == _GIT:  # of small files; those of a shared cache are fetched when read
            with tree.path(path).open("rb") as file:
                said = _git_id(entry.size, file)
        if said != known:
            found[path] = tree.path(path)
    return found


def _git_id(size: int, file: BytesIO | BufferedReader) -> str:
    """Return git's id of a file: https://git-scm.com/book/en/v2/Git-Internals-Git-Objects."""
    state = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    return hashlib.file_digest(file, lambda: state).hexdigest()


@dataclass(frozen=True, eq=False, kw_only=True)
class CheckHubStep(UnforeseenStep[None]):
    """Checks, before anything is published, that the hub's repository holds no other model."""

    name = "check-hub"
    before_publishing = True

    destination: HubDestination
    weights: Step[Artifact, ForeseenWeights]

    def run(self, have: Results, tools: Tools) -> StageResult[None]:
        """Raise what `check_free` does."""
        check_free(have[self.weights].tree, self.destination, tools.hub)
        return unrecorded(None)


@dataclass(frozen=True, eq=False, kw_only=True)
class UploadStep(UnforeseenStep[Uploaded]):
    """Publishes a target's weights on a hub, with a card and a record from its build.json."""

    name = "upload"
    publishes = True
    reads_record = True

    destination: HubDestination
    weights: Step[Artifact, ForeseenWeights]
    image: Step[Published, None]

    def run(self, have: Results, tools: Tools) -> StageResult[Uploaded]:
        """Return the commit; raises what `upload` does."""
        tree, place = have[self.weights].tree, self.destination
        names = [entry.path for entry in tree.files]
        build = read_build(self.of.folder)
        card = model_card(card_of_build(build), place.repository, names)
        about = About(card=card, record=public_record(build))
        return upload(tree, about, place, self.file.recipe.version, tools)
