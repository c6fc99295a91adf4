"""`affected`: what was made from an adapter, a base, an engine, in registries, layouts and fleets.

Every tag of a repository is resolved, indexes are followed, and so are images that have no tag any
more but something attached. Requests run at the same time, and no layer is read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TypeAlias

from weightsmith.api.commands.requests import AffectedCommand
from weightsmith.api.commands.verify import key_path
from weightsmith.api.results import Affected, Unread
from weightsmith.core.errors import (
    Altered,
    CheckFailed,
    EnvironmentFailure,
    InputRefused,
    UsageError,
    WeightsmithError,
)
from weightsmith.core.escape import joined
from weightsmith.core.ports import AnySigner, HubLister, Progress, Signer
from weightsmith.core.safe_parse import RECORD, parse, read_bytes
from weightsmith.core.values import Blob, Digest
from weightsmith.evaluating.results import NOT_PROVEN
from weightsmith.fleets.page import FILE as FLEET
from weightsmith.fleets.rows import FleetRows
from weightsmith.oci import catalog, manifests
from weightsmith.oci.attachments import Attachment, fallback_tag
from weightsmith.oci.layout import LayoutLocation, image_names, is_layout, locate, require_layout
from weightsmith.oci.references import DOCKER_HUB, Reference
from weightsmith.oci.registry import (
    ImageLocation,
    Listed,
    Registry,
    RegistryLocation,
    open_location,
)
from weightsmith.provenance import evidence, signing
from weightsmith.provenance.hub_recall import READ, HubRecall
from weightsmith.provenance.origins import KINDS, Wanted, wanted
from weightsmith.provenance.recall import AffectedImage, Judgement, Recall
from weightsmith.provenance.sealing import attach_signed
from weightsmith.provenance.withdrawal import failed_result, withdrawal, withdrawn_in

_AT_ONCE = 16
"""Requests at the same time."""
_DEEPEST = 8
"""Indexes in indexes; builders nest two."""
_MOST_MEMBERS = 1000
"""Images of an index; the largest have some dozens of platforms."""
_PLACES = "give REGISTRY/PREFIX, oci:DIR, or the folder that `fleet --dist` wrote"
_HUB = "hf://"
_ON_HUB = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
_COMMIT = re.compile("[0-9a-f]{7,40}")
_ASIDE = "unknown/unknown"
"""Platform of the attestations that other builders put beside their images."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Repository:
    """A repository, and what is known of it."""

    name: Reference
    listed: Listed


@dataclass(frozen=True, slots=True, kw_only=True)
class _Manifest:
    """A manifest to look at: by its tag, or by the digest that something else names."""

    repository: _Repository
    reference: Reference
    depth: int = 0
    platform: str = ""
    """What the index that lists it says that it is for."""
    size: int | None = None
    """Bytes that the index says that it has."""
    optional: bool = False
    """Whether it may be gone, as an image whose attachments stayed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Index:
    """An index that was read: its images are judged first."""

    repository: _Repository
    reference: str
    digest: Digest
    tags: tuple[str, ...]
    members: tuple[_Manifest, ...]


_Seen: TypeAlias = tuple[str, Digest]
"""Repository and digest."""


@dataclass(slots=True)
class _Found:
    """The answer as it grows."""

    rows: dict[_Seen, tuple[AffectedImage, bool]] = field(default_factory=dict)
    """Each with whether it is trusted."""
    indexes: list[_Index] = field(default_factory=list)
    problems: list[Unread] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    seen: dict[_Seen, int] = field(default_factory=dict)
    """What was read, with its bytes."""
    platforms: dict[_Seen, str] = field(default_factory=dict)
    """Those of the images that were read, by their own configurations."""

    def fault(self, reference: str, error: WeightsmithError | str, *, gap: bool = False) -> None:
        """Record what could not be read, or is not what it says.

        With `gap`, something was left out of the answer that may belong into it.
        """
        said = error if isinstance(error, str) else error.message
        gap = gap or not isinstance(error, str | InputRefused | Altered)
        self.problems.append(Unread(reference=reference, why=said, unreachable=gap))

    def judged(self, where: _Seen, reference: str, judgement: Judgement) -> None:
        """Record what was found of an image."""
        for why in judgement.faults:
            self.fault(reference, why)
        if judgement.row:
            self.rows[where] = judgement.row, judgement.trusted
        elif not judgement.ours:
            self.others.append(reference)


def question_of(asked: AffectedCommand, digest_of: Callable[[Path], Digest]) -> Wanted:
    """Return what is asked for; a folder is named by its digest, from `digest_of`.

    Raises UsageError unless exactly one thing is asked for.
    """
    given = [(kind, text) for kind in KINDS if (text := getattr(asked, kind))]
    flags = ", ".join(f"--{kind.replace('_', '-')}" for kind in KINDS)
    if len(given) != 1:
        what = "several things are asked for" if given else "nothing is asked for"
        raise UsageError(what, hint=f"give one of {flags}")
    kind, text = given[0]
    with suppress(OSError):  # too long for a path
        if kind in ("adapter", "base") and Path(text).expanduser().is_dir():
            return Wanted(kind=kind, name=digest_of(Path(text).expanduser()))
    return wanted(kind, text)


def find_affected(
    question: Wanted,
    places: Sequence[str],
    keys: Mapping[str, signing.Check],
    registry: Registry,
    progress: Progress,
    hub: HubLister | None = None,
) -> Affected:
    """Return every image, index and artifact in the places that was made from it.

    `keys` are names of public keys, with what checks their signatures. What cannot be read is named
    in the answer, and stops nothing else. Raises UsageError for a place that is none.
    """
    recall = Recall(wanted=question, keys=keys)
    found, pending = _Found(), list[_Manifest]()
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for place in places:
            if place.startswith(_HUB) and hub:
                _look_at_hub(place, HubRecall(wanted=question, keys=keys), hub, found)
            else:
                pending += _opened(place, recall, registry, found, pool)
        repositories = {one.repository.name.name for one in pending}
        done = 0
        while pending:
            total = done + len(pending)
            following = list[_Manifest]()
            tasks = _by_digest(pending, registry, found, pool)
            for number, below in enumerate(
                pool.map(lambda task: _look(task, recall, registry, found), tasks), start=1
            ):
                following += below
                progress.advance(done + number, total, "images")
            done, pending = total, following
        for level in _upward(found.indexes):
            list(pool.map(lambda one: _look_at_index(one, recall, registry, found), level))
    rows = sorted(found.rows.values(), key=lambda pair: (pair[0].reference, pair[0].digest))
    return Affected(
        by=question.kind,
        value=question.text,
        images=tuple(row for row, trusted in rows if trusted),
        unsigned=tuple(row for row, trusted in rows if not trusted),
        problems=tuple(sorted(set(found.problems), key=lambda one: (one.reference, one.why))),
        others=tuple(sorted(set(found.others))),
        repositories=len(repositories),
        looked_at=len(found.seen),
    )


def _opened(
    place: str, recall: Recall, registry: Registry, found: _Found, pool: ThreadPoolExecutor
) -> list[_Manifest]:
    """Return the manifests of a place in a registry; judge at once what is in a folder."""
    if not place.removeprefix("oci:").strip():
        raise UsageError("--in names no place", hint=_PLACES)
    path = Path(place).expanduser()
    if is_layout(place):
        _look_at_layout(place, recall, found)
        return []
    if path.name == FLEET or (path / FLEET).is_file():
        file = path if path.name == FLEET else path / FLEET
        return [
            one for cell in _cells(file) for one in _of_fleet(cell, recall, registry, found, pool)
        ]
    if path.is_dir():
        raise UsageError(
            f"--in {place}: the folder is no layout and has no {FLEET}",
            hint=_PLACES,
        )
    try:
        return _in_registry(place, registry, found, pool)
    except EnvironmentFailure as error:
        found.fault(place, error)
        return []


def _of_fleet(
    cell: str, recall: Recall, registry: Registry, found: _Found, pool: ThreadPoolExecutor
) -> list[_Manifest]:
    """Return the manifests of one image of a fleet; of one that is gone, name the gap."""
    try:
        return _opened(cell, recall, registry, found, pool)
    except WeightsmithError as error:
        found.fault(cell, error, gap=True)
        return []


def _cells(file: Path) -> Iterator[str]:
    """Yield the images that a fleet published."""
    try:
        rows = FleetRows.from_json(parse(read_bytes(file, RECORD), largest=RECORD, unique=True))
    except ValueError as error:
        raise InputRefused(f"{file} is damaged: {error}", hint="run the fleet again") from None
    for cell in rows.cells:
        if cell.image and cell.digest:
            layout = is_layout(cell.image)
            yield cell.image if layout else f"{cell.image.partition('@')[0]}@{cell.digest}"


def _in_registry(
    place: str, registry: Registry, found: _Found, pool: ThreadPoolExecutor
) -> list[_Manifest]:
    """Return the manifests below `REGISTRY[/PREFIX]`, or the one of a tag or digest."""
    text = place.rstrip("/").removesuffix("/*")
    host, slash, prefix = text.partition("/")
    whole = not slash and (":" in host or "." in host or host == "localhost")
    if whole:
        Reference.parse(f"{host}/x")  # refuses what is no host
        start = Reference(host, "")
    else:
        start = Reference.parse(text)
        if start.digest or ":" in (prefix or text).rpartition("/")[2]:
            listed = Listed(tags=_AnyTag(), has_api=True)
            return [_Manifest(repository=_Repository(name=start, listed=listed), reference=start)]
        start = Reference(start.registry, start.repository)
    names = None
    if start.registry != DOCKER_HUB:  # it has no catalog
        names = catalog.repositories(registry, start.registry, start.repository)
    if names is None and not start.repository:
        raise EnvironmentFailure(
            f"{host} does not list its repositories",
            hint="name them: --in REGISTRY/REPOSITORY, once for each",
        )
    named = {start.repository} - {""}
    repositories = sorted({*(names or ()), *named})

    def tagged(name: str) -> tuple[str, list[str] | WeightsmithError | None]:
        try:
            return name, catalog.tags(registry, Reference(start.registry, name))
        except WeightsmithError as error:
            return name, error

    pending = list[_Manifest]()
    for name, tags in pool.map(tagged, repositories):
        repository = Reference(start.registry, name)
        if isinstance(tags, WeightsmithError):
            found.fault(repository.name, tags)
        elif tags is None and len(repositories) == 1:
            raise InputRefused(
                f"{start.name}: there is no such repository, and none below it",
                hint="check the name; a registry without a catalog needs each repository's name",
            )
        elif tags:
            pending += _of_tags(repository, tags, registry)
    return pending


class _AnyTag(frozenset[str]):
    """The tags of a repository that was not listed: each may be there."""

    def __contains__(self, _: object) -> bool:
        return True


def _of_tags(repository: Reference, tags: Sequence[str], registry: Registry) -> list[_Manifest]:
    """Return a repository's tags, and the images that only its attachments' tags name."""
    subjects = {subject for tag in tags if (subject := catalog.subject_of(tag))}
    named = [tag for tag in tags if catalog.subject_of(tag) is None]
    probe = next(iter(subjects), Digest.of(b"{}"))
    listed = Listed(tags=frozenset(tags), has_api=registry.lists_referrers(repository, probe))
    known = _Repository(name=repository, listed=listed)
    found = [_Manifest(repository=known, reference=replace(repository, tag=tag)) for tag in named]
    return found + [
        _Manifest(repository=known, reference=repository.at(one), optional=True)
        for one in sorted(subjects)
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Task:
    """One manifest, read, with every tag that names it."""

    manifest: _Manifest
    digest: Digest
    body: bytes
    kind: str
    tags: tuple[str, ...]

    @property
    def reference(self) -> str:
        """How a user names it: by its first tag, or by its digest."""
        name = self.manifest.repository.name
        tag = self.tags[0] if self.tags else None
        return str(Reference(name.registry, name.repository, tag) if tag else name.at(self.digest))


def _by_digest(
    pending: Iterable[_Manifest], registry: Registry, found: _Found, pool: ThreadPoolExecutor
) -> list[_Task]:
    """Read manifests, and return each that was not seen before once, with its tags."""

    def read(one: _Manifest) -> tuple[_Manifest, bytes, str] | None:
        where = (one.repository.name.name, one.reference.digest)
        if one.reference.digest and where in found.seen:
            return None
        try:
            if one.optional and registry.digest_of(one.reference) is None:
                return None
            return one, *registry.read_manifest(one.reference)
        except WeightsmithError as error:
            # The user, or a fleet's list, named that very image.
            named = isinstance(one.repository.listed.tags, _AnyTag) and not one.depth
            found.fault(str(one.reference), error, gap=named)
            return None

    tasks = dict[_Seen, _Task]()
    # Names first: an image that has one is shown by it, and need not be read again.
    order = sorted(pending, key=lambda one: str(one.reference))
    waves = ([one for one in order if one.optional is last] for last in (False, True))
    for held in (held for wave in waves for held in pool.map(read, wave)):
        if held is None:
            continue
        one, body, kind = held
        digest = Digest.of(body)
        where = (one.repository.name.name, digest)
        tag = (one.reference.tag,) if one.reference.tag else ()
        if before := tasks.get(where):
            tasks[where] = replace(before, tags=(*before.tags, *tag))
        elif where not in found.seen:
            found.seen[where] = len(body)
            tasks[where] = _Task(manifest=one, digest=digest, body=body, kind=kind, tags=tag)
    return list(tasks.values())


def _look(task: _Task, recall: Recall, registry: Registry, found: _Found) -> list[_Manifest]:
    """Judge an image; of an index, return what it lists."""
    repository = task.manifest.repository
    try:
        if task.kind in manifests.INDEXES:
            return _members(task, found)
        if task.kind not in manifests.MANIFESTS or _is_other(task.body, task.reference):
            found.others.append(task.reference)
            return []
        place = repository.name.at(task.digest)
        image = registry.image_of(place, task.body, task.kind)
        found.platforms[repository.name.name, task.digest] = image.platform
        read = partial(_attached, registry, repository, task.digest, task.reference, found)
        signatures = partial(read, (signing.SIGNATURE_TYPE,), ".sig")
        attached = read(recall.kinds, ".att")
        judgement = recall.judge(image, attached, signatures, task.reference, task.tags)
    except WeightsmithError as error:
        found.fault(task.reference, error)
        return []
    found.judged((repository.name.name, task.digest), task.reference, judgement)
    return []


def _is_other(body: bytes, where: str) -> bool:
    """Return whether a manifest is of an artifact that no image of ours can be."""
    config = manifests.read_json(body, where).get("config")
    return not isinstance(config, dict) or config.get("mediaType") not in manifests.CONFIGS


def _members(task: _Task, found: _Found) -> list[_Manifest]:
    """Return the images and indexes that an index lists; name what of it is wrong."""
    one, where = task.manifest, task.reference
    rows = manifests.listed(manifests.read_json(task.body, where), "manifests", where)
    if one.depth >= _DEEPEST or len(rows) > _MOST_MEMBERS:
        deep = f"indexes are nested deeper than {_DEEPEST}, and what is below was not read"
        many = f"an index lists {len(rows)} images; of more than {_MOST_MEMBERS}, none is read"
        found.fault(where, deep if one.depth >= _DEEPEST else many, gap=True)
        return []
    if twice := manifests.twice_in(task.body, where):
        found.fault(where, f"the index has several images for {', '.join(twice)[:200]}")
    members, name = dict[Digest, _Manifest](), one.repository.name
    for row in rows:
        platform = manifests.platform_of(row.get("platform")) if isinstance(row, dict) else ""
        if platform == _ASIDE:
            continue
        kinds = (*manifests.MANIFESTS, *manifests.INDEXES)
        try:
            blob = manifests.descriptor(row, where, kinds, manifests.LARGEST_MANIFEST)
        except InputRefused as error:  # engines take the others all the same
            found.fault(where, error)
            continue
        below = _Manifest(
            repository=one.repository,
            reference=name.at(blob.digest),
            depth=one.depth + 1,
            platform=platform,
            size=blob.size,
        )
        members[blob.digest] = below
    found.indexes.append(
        _Index(
            repository=one.repository,
            reference=where,
            digest=task.digest,
            tags=task.tags,
            members=tuple(members.values()),
        )
    )
    return list(members.values())


def _attached(
    registry: Registry,
    repository: _Repository,
    digest: Digest,
    reference: str,
    found: _Found,
    kinds: Sequence[str],
    suffix: str,
) -> list[Attachment]:
    """Read what of these kinds is attached to an image, also under cosign's tag.

    What cannot be read is a gap in the answer, and does not hide the image.
    """
    place, read = repository.name.at(digest), list[Attachment]()
    among = replace(repository.listed, kinds=kinds)
    tag = fallback_tag(digest, suffix)
    rows: Sequence[tuple[Blob, str]] = ()
    try:
        if tag in among.tags and (held := registry.attachment_under(place, tag)):
            read.append(held)
    except WeightsmithError as error:
        found.fault(reference, error, gap=True)
    try:
        rows = evidence.limited(registry.attached(place, digest, tagged=False, among=among))
    except WeightsmithError as error:
        found.fault(reference, error, gap=True)
    known = {one.blob.digest for one in read}
    for blob, _ in rows:
        try:
            if blob.digest not in known:
                read.append(registry.read_attachment(place, blob, whole=False))
        except WeightsmithError as error:
            found.fault(reference, error)
    return read


def _upward(indexes: Iterable[_Index]) -> Iterator[list[_Index]]:
    """Yield indexes in groups, each after the indexes that it lists."""
    waiting = {(one.repository.name.name, one.digest): one for one in indexes}
    while waiting:
        ready = {
            (name, digest): one
            for (name, digest), one in waiting.items()
            if not any((name, m.reference.digest) in waiting for m in one.members)
        }
        yield list(ready.values())
        waiting = {where: one for where, one in waiting.items() if where not in ready}


def _look_at_index(one: _Index, recall: Recall, registry: Registry, found: _Found) -> None:
    """Add an index to the answer if an image of it is in it."""
    name, rows = one.repository.name.name, list[tuple[AffectedImage, bool]]()
    for member in one.members:
        where = (name, Digest(str(member.reference.digest)))
        _compare(member, found.seen.get(where), found.platforms.get(where), found)
        rows += [pair] if (pair := found.rows.get(where)) else []
    if not rows:
        return
    read = partial(_attached, registry, one.repository, one.digest, one.reference, found)
    attached = [*read(recall.kinds, ".att"), *read((signing.SIGNATURE_TYPE,), ".sig")]
    pair, why = _index_row(one.digest, one.reference, one.tags, rows, attached, recall)
    found.rows[name, one.digest] = pair
    if why:
        found.fault(one.reference, why)


def _compare(said: _Manifest, size: int | None, platform: str | None, found: _Found) -> None:
    """Record where an index says something else of an image than the image does."""
    where = str(said.reference)
    if size not in (None, said.size):
        found.fault(where, f"an index says that it has {said.size} bytes, not {size}")
    if platform and said.platform and said.platform != platform:
        found.fault(where, f"an index says that it is for {said.platform}, the image {platform}")


def _index_row(
    digest: Digest,
    reference: str,
    tags: tuple[str, ...],
    below: Sequence[tuple[AffectedImage, bool]],
    attached: Sequence[Attachment],
    recall: Recall,
) -> tuple[tuple[AffectedImage, bool], str]:
    """Return an index of images that are in the answer, whether it is trusted, and what is wrong.

    The images come with whether they are trusted.
    """
    signers, why = recall.signers_of(digest, attached)
    rows = [row for row, _ in below]
    chains, verdicts = sorted({row.chain for row in rows}), {row.verdict for row in rows}
    row = AffectedImage(
        reference=reference,
        digest=digest,
        form="index",
        verdict=verdicts.pop() if len(verdicts) == 1 else NOT_PROVEN,
        platforms=tuple(sorted({name for row in rows for name in row.platforms})),
        built=max((row.built for row in rows if row.built), default=None),
        dated=max(rows, key=lambda row: row.built or "").dated,
        signed_by=tuple(sorted(signers - {""})),
        chain="; ".join(chains) if signers else "the index is not signed, its images are listed",
        because=tuple(dict.fromkeys(text for row in rows for text in row.because)),
        tags=tags,
        withdrawn=recall.withdrawn(digest, attached),
        members=tuple(row.digest for row in rows),
        withdrawn_members=_gone(rows),
    )
    return (row, bool(signers) and all(trusted for _, trusted in below)), why


def _gone(rows: Iterable[AffectedImage]) -> tuple[str, ...]:
    return tuple(one.digest for one in rows if one.withdrawn is not None or one.withdrawn_members)


def _look_at_hub(place: str, recall: HubRecall, hub: HubLister, found: _Found) -> None:
    """Judge every commit of a repository, or the one named, or of all repositories of an owner.

    Raises UsageError for another form of name, and for a revision that is no commit.
    """
    name, at, commit = place.removeprefix(_HUB).partition("@")
    name, commit = name.strip("/"), commit.lower()
    if not _ON_HUB.fullmatch(name):
        raise UsageError(
            f"--in {place}: a hub has no such place",
            hint="give hf://OWNER for all of an owner's models, or hf://OWNER/NAME for one",
        )
    if at and not ("/" in name and _COMMIT.fullmatch(commit)):
        raise UsageError(
            f"--in {place}: what follows @ is no commit of a repository",
            hint="give hf://OWNER/NAME@COMMIT, of the commit at least seven digits",
        )
    try:
        repositories = [name] if "/" in name else hub.repositories(name)
    except EnvironmentFailure as error:
        found.fault(place, error)
        return
    for repository in repositories:
        try:
            for one in hub.commits(repository, READ, commit):
                where = f"{_HUB}{repository}", Digest.of(one.commit.encode())
                found.seen[where] = 0
                found.judged(where, f"{_HUB}{repository}@{one.commit}", recall.judge(one))
        except WeightsmithError as error:
            found.fault(place if at else f"{_HUB}{repository}", error, gap=True)


def _look_at_layout(place: str, recall: Recall, found: _Found) -> None:
    """Judge every image and index of a layout."""
    folder, name = locate(place)
    require_layout(folder)
    for each in [name] if name else sorted(image_names(folder)):
        location = LayoutLocation(folder, each or None)
        reference = f"oci:{folder}" + (f":{each}" if each else "")
        try:
            _look_at_name(location, reference, recall, found)
        except WeightsmithError as error:
            found.fault(reference, error, gap=True)


def _look_at_name(location: LayoutLocation, reference: str, recall: Recall, found: _Found) -> None:
    """Judge what a layout has under one name: an image, or an index and its images."""
    index, here = location.index(), str(location.folder)
    tags = (location.name,) if location.name else ()

    def attached(subject: Digest) -> list[Attachment]:
        return [location.read(blob) for blob, _ in evidence.limited(location.attached(subject))]

    rows = list[tuple[AffectedImage, bool]]()
    for platform in manifests.platforms_in(index, reference) if index else [""]:
        image = location.image(platform or None)
        judgement = recall.judge(image, attached(image.digest), lambda: (), reference, tags)
        found.seen[here, image.digest] = len(image.manifest_bytes)
        found.judged((here, image.digest), reference, judgement)
        rows += [pair] if (pair := found.rows.get((here, image.digest))) else []
    if index is None:
        return
    digest = Digest.of(index)
    found.seen[here, digest] = len(index)
    if twice := manifests.twice_in(index, reference):
        said = f"the index has several images for {', '.join(twice)[:200]}, and one was read"
        found.fault(reference, said, gap=True)
    if rows:
        found.rows[here, digest], why = _index_row(
            digest, reference, tags, rows, attached(digest), recall
        )
        if why:
            found.fault(reference, why)


def keys_of(
    asked: AffectedCommand, signer: AnySigner | None, identity: signing.Check | None = None
) -> Mapping[str, signing.Check]:
    """Return whom to believe: the keys and the identity that are named, else who withdraws.

    Raises UsageError for a key that cannot be read, and for options that do not fit together.
    """
    if asked.withdraw and signer is None:
        hint = "only a signed statement counts"
        raise UsageError("--withdraw needs --sign-key or --keyless", hint=hint)
    if asked.reason and not asked.withdraw:
        raise UsageError("--reason needs --withdraw", hint="without it, nothing is withdrawn")
    if signer and not (asked.withdraw or (asked.rebase and not asked.out)):
        raise UsageError("--sign-key needs --withdraw or --rebase", hint="nothing else is signed")
    if asked.rebuild and asked.rebase:
        raise UsageError("--rebuild and --rebase exclude each other", hint="give one of them")
    if asked.out and not (asked.rebuild or asked.rebase):
        raise UsageError("--out needs --rebuild or --rebase", hint="it is their fleet file")
    for key in asked.keys:
        key_path(key)
    checks = {key: signing.read_public_key(Path(key).expanduser()) for key in asked.keys}
    if identity:
        checks[signing.whom(identity)] = identity
    if signer and not checks:
        check = signing.check_of_signer(signer)
        checks[asked.run.sign_key or signing.whom(check)] = check
    return checks


def warn_of_other_keys(
    found: Affected, keys: Mapping[str, signing.Check], signer: AnySigner, progress: Progress
) -> None:
    """Warn of images whose signers' keys do not honour a withdrawal by this signer."""
    if not isinstance(signer, Signer):
        return  # an identity is named by patterns, which others may match too
    probe = b"weightsmith"
    signature = signer.sign(probe)
    own = {name for name, check in keys.items() if check(probe, signature)}
    if others := [row for row in found.images if not own.intersection(row.signed_by)]:
        by = ", ".join(sorted({name for row in others for name in row.signed_by}))
        progress.warn(
            f"{len(others)} images are signed by {by}, and not by the key that withdraws them: "
            f"whoever checks with {by} will not honour the withdrawal"
        )


def withdraw_all(
    found: Affected, reason: str, signer: AnySigner, registry: Registry, progress: Progress
) -> Affected:
    """Attach a signed withdrawal to each trusted image; return the answer as it is then.

    What is withdrawn already is left as it is, and so is what nobody signed: anyone could have made
    it look like this. Raises EnvironmentFailure if a registry refuses; what was done by then stays.
    """
    why = reason or f"made from {found.by.replace('_', ' ')} {found.value}"
    rows = list[AffectedImage]()
    if before := sum(row.withdrawn is not None for row in found.images):
        progress.note(f"{before} images were withdrawn before, and keep their reason")
    for number, row in enumerate(found.images):
        progress.advance(number, len(found.images), "images")
        if row.form == "hub":
            progress.warn(f"{row.reference} is not withdrawn: delete or replace it on the hub")
        elif row.withdrawn is None:
            place = open_location(_pinned(row), registry)
            image = _blob(row, place)
            told = withdrawal(image, why, {found.by: found.value})
            attach_signed((told, failed_result(told, image)), image, place, signer)
            row = replace(row, withdrawn=withdrawn_in([told], row.digest))
        rows.append(row)
    if found.unsigned:
        progress.warn(
            f"{len(found.unsigned)} images that no key vouches for were not withdrawn: sign those "
            "that are yours (`push --sign-key`), and withdraw again"
        )
    elif not rows:
        progress.warn("nothing was found, so nothing is withdrawn")
    gone = dict.fromkeys(row.digest for row in rows if row.withdrawn is not None)

    def marked(row: AffectedImage) -> AffectedImage:
        known = (*row.withdrawn_members, *(one for one in row.members if one in gone))
        return replace(row, withdrawn_members=tuple(dict.fromkeys(known)))

    unsigned = tuple(marked(row) for row in found.unsigned)
    return replace(found, images=tuple(marked(row) for row in rows), unsigned=unsigned)


def _pinned(row: AffectedImage) -> str:
    """Return an image's name with its digest: a tag may move at any time."""
    if is_layout(row.reference):
        return row.reference
    return f"{row.reference.partition('@')[0]}@{row.digest}"


def _blob(row: AffectedImage, place: ImageLocation) -> Blob:
    """Return the descriptor of an image or index."""
    if isinstance(place, RegistryLocation):
        body, kind = place.registry.read_manifest(place.reference)
        return Blob(digest=Digest(row.digest), size=len(body), media_type=kind)
    if row.form == "index" and (index := place.index()):
        return Blob(digest=Digest.of(index), size=len(index), media_type=manifests.OCI_INDEX)
    return place.image(next(iter(row.platforms), None)).manifest_blob


def affected_text(found: Affected) -> str:
    """Return the answer as text: a line for each image, and what could not be answered."""
    what = f"{found.by.replace('_', ' ')} {found.value}"
    lines = [f"{len(found.images)} made from {what}"]
    lines += [line for row in found.images for line in _lines(row)]
    if found.unsigned:
        lines.append(f"{len(found.unsigned)} more say so, unsigned:")
        lines += [line for row in found.unsigned for line in _lines(row)]
    if found.remade:
        lines.append("made again:")
        lines += [f"  {one.source}: {one.error or one.reference}" for one in found.remade]
    if found.problems:
        lines.append(f"{len(found.problems)} could not be answered, or are not what they say:")
        lines += [f"  {one.reference}: {one.why}" for one in found.problems]
    others = f", {len(found.others)} of them not made by weightsmith" if found.others else ""
    where = f"{found.repositories} repositories"
    lines.append(f"looked at {found.looked_at} manifests in {where}{others}")
    return joined(lines)


def _lines(row: AffectedImage) -> Iterator[str]:
    by = "" if row.dated in ("", "configuration") else f" by {row.dated}"
    facts = [row.form, row.verdict, ", ".join(row.platforms), f"{row.built or ''}{by}"]
    facts += [f"signed by {', '.join(row.signed_by)}"] if row.signed_by else []
    digest = row.digest.removeprefix("sha256:")[:12]
    yield f"  {row.reference}  {digest}  {'  '.join(filter(None, facts))}"
    yield f"    {'; '.join(row.because)}; chain: {row.chain}"
    if row.withdrawn is not None:
        yield f"    WITHDRAWN: {row.withdrawn}"
    elif row.withdrawn_members:
        yield f"    WITHDRAWN of it: {', '.join(one[:19] for one in row.withdrawn_members)}"


def error_of(found: Affected) -> WeightsmithError | None:
    """Return what the command ends with if a place could not be reached, or an image not made."""
    missing = [one for one in found.problems if one.unreachable]
    if failed := [one for one in found.remade if one.error]:
        return CheckFailed(
            f"{len(failed)} of {len(found.remade)} images were not made again; {failed[0].source}: "
            f"{failed[0].error}",
            hint="`build --from` or `rebase` takes each by itself",
            details=found.to_json(),
        )
    if not missing:
        return None
    first = missing[0]
    return EnvironmentFailure(
        f"{len(missing)} could not be read, so the answer is not whole; {first.reference}: "
        f"{first.why}",
        hint="get access to it and ask again, or name only what you can read",
        details=found.to_json(),
    )
