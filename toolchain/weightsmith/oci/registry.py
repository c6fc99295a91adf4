"""Pushes images to registries and pulls them, streaming; nothing is written to disk.

Also where an image and its attachments are: a registry reference or a layout folder.

Attachments are found by the referrers API or by tags.
https://github.com/opencontainers/distribution-spec/blob/main/spec.md#listing-referrers
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, Self, TypeAlias

import httpx

from weightsmith.core.errors import EnvironmentFailure, InputRefused, UsageError, WeightsmithError
from weightsmith.core.values import Blob, Digest, JsonValue, Published
from weightsmith.oci import connections, manifests, transfers
from weightsmith.oci.attachments import Attachment, fallback_tag, load_attachment, with_rows
from weightsmith.oci.connections import ProxyTransport
from weightsmith.oci.image import Image, ImageOrIndex, Opener, host_image, image_layers, load_image
from weightsmith.oci.layers import Advance, Meter
from weightsmith.oci.layout import LayoutLocation, is_layout, locate, require_layout
from weightsmith.oci.limits import UploadDeadline, check_layers, limits_of
from weightsmith.oci.references import Reference
from weightsmith.oci.session import Credentials, RegistrySession, anonymous
from weightsmith.oci.transfers import Transfer

_OK = 200
_MOST_PAGES = 20
_COSIGN = (".sig", ".att")
"""Tag suffixes under which cosign keeps signatures and statements."""
_WORTH_MOUNTING = 1 << 20
"""Bytes; sending a smaller layer takes no longer than asking for a mount."""


class LayerMemory(Protocol):
    """Remembers which repository of a registry has which layers."""

    def repository(self, registry: str, digest: Digest) -> str:
        """Return a repository that had the layer when it was last pushed, or empty."""

    def record(self, registry: str, repository: str, digests: Iterable[Digest]) -> None:
        """Record that a repository has these layers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """What is known of a repository when many of its images are read."""

    tags: Collection[str]
    """All of them."""
    has_api: bool
    """Whether the registry lists referrers; if not, it is not asked again."""
    kinds: Collection[str] = ()
    """Artifact types to return, and those whose list does not say theirs; () for all."""

    def rows(
        self, session: RegistrySession, reference: Reference, subject: Digest
    ) -> list[JsonValue]:
        """Return the referrers list: the API's, and what an older client left under a tag."""
        found = (_by_api(session, reference, subject) or []) if self.has_api else []
        tag = fallback_tag(subject)
        return [*found, *((tag in self.tags and _by_tag(session, reference, tag)) or [])]

    def leaves_out(self, row: Mapping[str, JsonValue]) -> bool:
        """Return whether a row of a referrers list is of a kind that nobody asked for."""
        kind = row.get("artifactType")
        return bool(self.kinds) and isinstance(kind, str) and not kind.startswith((*self.kinds,))


class Registry:
    """Registry client; safe to use from several threads, closed by `close()` or `with`.

    Plain HTTP is used for loopback hosts and with `insecure`, if the host speaks no TLS;
    certificates are verified unless `insecure`. Errors name the host, the status and what to do:
    EnvironmentFailure for the registry, access to it and data altered in transit, InputRefused
    for a malformed image, UsageError for a wrong request.
    """

    def __init__(
        self,
        *,
        credentials: Credentials = anonymous,
        insecure: bool = False,
        transport: httpx.BaseTransport | None = None,
        pause: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
        memory: LayerMemory | None = None,
    ) -> None:
        self._memory = memory
        verify = connections.unverified() if insecure else connections.trusted()
        self._client = httpx.Client(
            transport=transport or ProxyTransport(verify), timeout=60, trust_env=False
        )
        self._credentials = credentials
        self._insecure = insecure
        self._pause = pause
        self._clock = clock
        self._sessions: dict[tuple[str, str, tuple[str, ...]], RegistrySession] = {}
        self._allowed: set[tuple[str, str]] = set()
        """Registries, with what their repositories' names begin with, that took an upload."""
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the connections."""
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def check_push(self, reference: Reference) -> None:
        """Check that we may push, before long work; leaves nothing in the registry.

        It opens and cancels an upload, which needs the same rights as a push; of repositories
        side by side, only in the first, since a fleet pushes to hundreds with the same credentials.
        Raises EnvironmentFailure if the registry cannot be reached or refuses the credentials.
        """
        namespace = (reference.registry, reference.repository.rpartition("/")[0])
        if namespace not in self._allowed:
            transfers.try_upload(self.session(reference, "pull,push"), str(reference))
            self._allowed.add(namespace)

    def push(
        self,
        whole: ImageOrIndex,
        reference: Reference,
        *,
        force: bool = False,
        mount_from: Sequence[str] = (),
        also_tags: Sequence[str] = (),
        before_tag: Callable[[], None] = lambda: None,
        progress: Advance | None = None,
        warn: Callable[[str], None] = lambda _: None,
        parallel: int = 4,
    ) -> Published:
        """Push an image: missing blobs, then the manifest, then the tag; first an index's images.

        If the tag names the image already, its blobs are not looked for, unless `force`: a registry
        takes a manifest after its blobs.
        `mount_from` are repositories of the same registry that may have layers already;
        `before_tag` is called once the image is there by its digest; `also_tags` are set before
        the reference's own; `warn` gets a message about a layer that uploads too slowly.
        Raises UsageError if a tag names another digest, unless `force`.
        """
        began = time.monotonic()
        if reference.digest and reference.digest != whole.digest:
            raise UsageError(
                f"the image has the digest {whole.digest}, not the one in {reference}",
                hint="leave the digest out of the reference",
            )
        layers = whole.layers if isinstance(whole, Image) else ()
        names = [(layer.file or layer.digest.short, layer.size) for layer in layers]
        check_layers(names, reference.registry)
        sources = transfers.mount_sources(layers, reference, mount_from)
        session = self.session(reference, "pull,push", sources)
        sent: list[tuple[Transfer, int]] = []
        done: list[Published] = []
        if is_new := not _guard_tag(session, reference, whole, force):
            if isinstance(whole, Image):
                sent = transfers.upload_layers(
                    session,
                    whole,
                    sources,
                    progress,
                    parallel,
                    lambda blob: self._elsewhere(reference, blob),
                    deadline=UploadDeadline(limits_of(reference.registry), warn, self._clock),
                )
            else:
                target = Reference(reference.registry, reference.repository)
                done = [self.push(x, target, progress=progress, warn=warn) for x in whole.images]
            transfers.put_manifest(session, whole.digest, whole.manifest_bytes, whole.media_type)
        before_tag()
        tags = (*also_tags, *([reference.tag] if is_new and reference.tag else []))
        for tag in tags:
            named = Reference(reference.registry, reference.repository, tag)
            manifest, kind = whole.manifest_bytes, whole.media_type
            transfers.put_tag(session, named, manifest, kind, force=force)
        if self._memory and is_new and layers:
            large = [layer.digest for layer in layers if layer.size >= _WORTH_MOUNTING]
            self._memory.record(reference.registry, reference.repository, large)
        own = _published(reference, whole.digest, sent, began)
        return replace(
            own,
            layers=image_layers(host_image(whole)),
            uploaded_bytes=sum(one.uploaded_bytes for one in (own, *done)),
            mounted=sum(one.mounted for one in (own, *done)),
        )

    def pull(self, reference: Reference, *, platform: str | None = None) -> Image:
        """Return the image for a platform (default: this one); layers are read when opened."""
        body, kind = transfers.manifest(self.session(reference, "pull"), reference)
        return self._image(reference, body, kind, platform)

    def _image(self, reference: Reference, body: bytes, kind: str, platform: str | None) -> Image:
        session = self.session(reference, "pull")
        for _ in range(4):
            if kind not in manifests.INDEXES:
                break
            index = manifests.read_json(body, str(reference))
            rows = manifests.listed(index, "manifests", str(reference))
            chosen = manifests.choose(rows, platform, str(reference))
            body, kind = transfers.manifest(session, reference.at(chosen.digest))
        return self.image_of(reference, body, kind)

    def image_of(self, reference: Reference, body: bytes, kind: str) -> Image:
        """Return the image of a manifest that was read; raises InputRefused if it is none."""
        session = self.session(reference, "pull")
        return load_image(
            body,
            kind,
            read=lambda blob: b"".join(transfers.blob(session, blob)),
            opener=lambda blob: lambda: transfers.blob(session, blob),
            where=str(reference),
            origin=reference,
        )

    def pull_all(self, reference: Reference) -> tuple[Image, ...]:
        """Return the images for all Linux platforms of an index, or the only image."""
        body, kind = transfers.manifest(self.session(reference, "pull"), reference)
        if kind not in manifests.INDEXES:
            return (self._image(reference, body, kind, None),)
        found = manifests.platforms_in(body, str(reference))
        return tuple(self._image(reference, body, kind, platform) for platform in found)

    def digest_of(self, reference: Reference) -> Digest | None:
        """Return the digest that the reference resolves to now (image or index), or None."""
        return transfers.digest_of(self.session(reference, "pull"), reference)

    def confirmed(self, reference: Reference) -> Digest | None:
        """Return the same, or None also if the registry does not answer after few tries."""
        try:
            return transfers.digest_of(self.session(reference, "pull"), reference, tries=2)
        except WeightsmithError:
            return None

    def read_manifest(self, reference: Reference) -> tuple[bytes, str]:
        """Return a manifest's bytes, checked against its digest, and its media type."""
        return transfers.manifest(self.session(reference, "pull"), reference)

    def read_blob(self, reference: Reference, blob: Blob, start: int = 0) -> Iterator[bytes]:
        """Yield a blob's bytes from an offset on; the caller verifies them."""
        return transfers.blob_from(self.session(reference, "pull"), blob, start)

    def check_tag(self, reference: Reference, digest: Digest) -> None:
        """Raise UsageError if the reference's tag names another digest."""
        _guard_tag(self.session(reference, "pull,push"), reference, digest, force=False)

    def has(self, reference: Reference, blob: Blob) -> bool:
        """Say whether the reference's repository has a blob."""
        return transfers.has(self.session(reference, "pull,push"), blob)

    def push_manifest(
        self,
        reference: Reference,
        manifest: bytes,
        media_type: str,
        blobs: Sequence[tuple[Blob, Opener]] = (),
        *,
        force: bool = True,
        mount_from: Sequence[str] = (),
        before_tag: Callable[[], None] = lambda: None,
        progress: Advance | None = None,
        warn: Callable[[str], None] = lambda _: None,
    ) -> Published:
        """Push any manifest and its blobs, such as an index, or a statement about an image.

        First by digest, then under the reference's tag, if it has one; `before_tag` is called in
        between. Raises UsageError if the tag names another digest, unless `force`.
        """
        began, digest = time.monotonic(), Digest.of(manifest)
        check_layers([(blob.digest.short, blob.size) for blob, _ in blobs], reference.registry)
        sources = [name for name in mount_from if name != reference.repository]
        session = self.session(reference, "pull,push", sources)
        _guard_tag(session, reference, digest, force)
        deadline = UploadDeadline(limits_of(reference.registry), warn, self._clock)
        unique = {blob.digest: (blob, deadline.over(opener, blob.size)) for blob, opener in blobs}
        meter = Meter(sum(blob.size for blob, _ in unique.values()), progress)
        sent = transfers.upload_each(
            session,
            [*unique.values()],
            lambda pair: pair,
            sources,
            meter,
            elsewhere=lambda blob: self._elsewhere(reference, blob),
        )
        transfers.put_manifest(session, digest, manifest, media_type)
        before_tag()
        if reference.tag:
            target = replace(reference, digest=None)
            transfers.put_tag(session, target, manifest, media_type, force=force)
        return _published(reference, digest, sent, began)

    def attach(self, reference: Reference, *attachments: Attachment, every: bool = False) -> None:
        """Push attachments into their image's repository, where every reader will find them.

        One that is listed already, or whose manifest is there, is not sent again: a registry takes
        a manifest after its blobs, and a list is written last. With `every`, each manifest is
        looked for.
        """
        session = self.session(reference, "pull,push")
        added: dict[Digest, list[Attachment]] = {}
        knows = True
        digests = {attachment.blob.digest for attachment in attachments}
        listed = set() if every else _listed(session, reference, attachments)
        there = listed | {
            one for one in digests - listed if transfers.digest_of(session, reference.at(one))
        }
        missing = [a for a in attachments if a.blob.digest not in there]
        blobs = {blob.digest: (blob, o) for a in missing for blob, o in a.blobs()}
        for blob, opener in blobs.values():
            transfers.upload_blob(session, blob, opener)
        for attachment in attachments:
            data, digest = attachment.manifest_bytes, attachment.blob.digest
            reply = None
            if digest not in there:
                reply = transfers.put_manifest(session, digest, data, manifests.OCI_MANIFEST)
            if attachment.tag:
                named = Reference(reference.registry, reference.repository, attachment.tag)
                transfers.put_tag(session, named, data, manifests.OCI_MANIFEST, force=True)
            if _has_subject(attachment):
                knows = knows and (reply is None or "oci-subject" in reply.headers)
                added.setdefault(attachment.subject.digest, []).append(attachment)
        for subject, those in added.items():
            if all(one.blob.digest in listed for one in those):
                continue
            # Some registries send this header and still have no referrers API.
            if not knows or _by_api(session, reference, subject) is None:
                _list(session, reference, subject, those)

    def attached(
        self,
        reference: Reference,
        subject: Digest,
        *,
        tagged: bool = True,
        among: Listed | None = None,
    ) -> list[tuple[Blob, str]]:
        """Return the manifests attached to an image, each with its tag or an empty one.

        Without `tagged`, only those in the referrers list, not those under cosign's tags. `among`
        says what is known of the repository, and which kinds are wanted.
        """
        session, kinds = self.session(reference, "pull"), (manifests.OCI_MANIFEST,)
        where = str(reference)
        listed = among.rows if among else _rows
        found = {
            blob.digest: (blob, "")
            for row in listed(session, reference, subject)
            if isinstance(row, dict)
            and row.get("mediaType") in kinds
            and not (among and among.leaves_out(row))
            for blob in [manifests.descriptor(row, where, kinds, manifests.LARGEST_MANIFEST)]
        }
        for suffix in _COSIGN if tagged else ():
            tag = fallback_tag(subject, suffix)
            target = Reference(reference.registry, reference.repository, tag)
            if digest := transfers.digest_of(session, target):
                unsized = Blob(digest=digest, size=0, media_type=manifests.OCI_MANIFEST)
                found[digest] = (found[digest][0] if digest in found else unsized, tag)
        return list(found.values())

    def attachment_under(self, reference: Reference, tag: str) -> Attachment | None:
        """Return the attachment under a tag, such as cosign's, without its configuration."""
        target = Reference(reference.registry, reference.repository, tag)
        session = self.session(reference, "pull")
        if (found := transfers.manifest_or_none(session, target)) is None:
            return None
        return load_attachment(
            found[0],
            lambda part: lambda: transfers.blob(session, part),
            str(target),
            tag,
            whole=False,
        )

    def lists_referrers(self, reference: Reference, subject: Digest) -> bool:
        """Say whether the registry has the referrers API, by asking about an image."""
        return _by_api(self.session(reference, "pull"), reference, subject) is not None

    def read_attachment(
        self, reference: Reference, blob: Blob, tag: str = "", *, whole: bool = True
    ) -> Attachment:
        """Return an attachment; raises Altered if it does not match its digest.

        Not `whole`, it has no configuration, as for one that is read and not copied.
        """
        session, target = self.session(reference, "pull"), reference.at(blob.digest)
        return load_attachment(
            transfers.manifest(session, target)[0],
            lambda part: lambda: transfers.blob(session, part),
            str(target),
            tag,
            whole=whole,
        )

    def _elsewhere(self, reference: Reference, blob: Blob) -> tuple[RegistrySession, str] | None:
        """Return another repository that a layer was pushed to, with a session for it."""
        if self._memory is None:
            return None
        name = self._memory.repository(reference.registry, blob.digest)
        if not name or name == reference.repository:
            return None
        # A separate session: a registry that refuses the other repository may refuse the whole
        # token.
        return self.session(reference, "pull,push", (name,)), name

    def session(
        self, reference: Reference, actions: str, also: Sequence[str] = ()
    ) -> RegistrySession:
        """Return the session for a repository; it is kept for its token."""
        key = (reference.name, actions, tuple(also))
        with self._lock:
            if key not in self._sessions:
                self._sessions[key] = RegistrySession(
                    self._client,
                    reference,
                    actions=actions,
                    also=tuple(also),
                    credentials=self._credentials,
                    insecure=self._insecure,
                    pause=self._pause,
                )
            return self._sessions[key]


def _published(
    reference: Reference,
    digest: Digest,
    sent: Sequence[tuple[Transfer, int]],
    began: float,
) -> Published:
    """Return what was pushed, without layers; `began` is a time of the monotonic clock."""
    return Published(
        reference=str(reference),
        digest=digest,
        layers=(),
        uploaded_bytes=sum(size for how, size in sent if how is Transfer.SENT),
        mounted=sum(how is Transfer.MOUNTED for how, _ in sent),
        seconds=time.monotonic() - began,
    )


def _guard_tag(
    session: RegistrySession, reference: Reference, image: ImageOrIndex | Digest, force: bool
) -> bool:
    """Refuse to move a tag, and return whether it names the image already; not with `force`.

    The image is hashed only if the tag exists.
    """
    if force or not reference.tag:
        return False
    found = transfers.digest_of(session, replace(reference, digest=None))
    if found and found != (image if isinstance(image, Digest) else image.digest):
        raise transfers.tag_conflict(reference, found)
    return found is not None


def _listed(
    session: RegistrySession, reference: Reference, attachments: Sequence[Attachment]
) -> set[Digest]:
    """Return which attachments their images' lists have; none of a list that cannot be read."""
    found: set[str] = set()
    for subject in {one.subject.digest for one in attachments if _has_subject(one)}:
        # Some registries without the API fail when they are asked for it.
        with suppress(EnvironmentFailure):
            rows = _rows(session, reference, subject)
            found |= {str(row.get("digest")) for row in rows if isinstance(row, dict)}
    return {one.blob.digest for one in attachments if one.blob.digest in found}


def _has_subject(attachment: Attachment) -> bool:
    """Return whether its manifest names the image, as cosign's own do not."""
    return attachment.raw is None or b'"subject"' in attachment.raw


def _list(
    session: RegistrySession, reference: Reference, subject: Digest, those: list[Attachment]
) -> None:
    tag = fallback_tag(subject)
    rows = _by_tag(session, reference, tag)
    if rows is None:
        # The fallback tag is taken, and we must not overwrite it.
        raise InputRefused(
            f"{reference.registry}/{reference.repository}:{tag} is an image, not a referrers list",
            hint="`cosign copy` leaves such a tag: delete it in the registry",
        )
    index = with_rows(rows, those)
    if index != with_rows(rows, ()):
        transfers.put_manifest(session, tag, index, manifests.OCI_INDEX)


def _rows(session: RegistrySession, reference: Reference, subject: Digest) -> list[JsonValue]:
    rows = _by_api(session, reference, subject)
    return _by_tag(session, reference, fallback_tag(subject)) or [] if rows is None else rows


def _by_api(
    session: RegistrySession, reference: Reference, subject: Digest
) -> list[JsonValue] | None:
    """Return the API's list, or None if the registry has no referrers API."""
    url = f"referrers/{subject}"
    rows: list[JsonValue] = []
    for _ in range(_MOST_PAGES):
        reply = session.attempt(
            f"cannot list what is attached to {reference}",
            lambda url=url: session.call("GET", url, limit=manifests.LARGEST_MANIFEST),  # type: ignore[misc]
        )
        if reply.status != _OK:
            return rows or None
        try:
            document = manifests.read_json(reply.body, str(reference))
            rows += manifests.listed(document, "manifests", str(reference))
        except InputRefused:
            return None  # some proxies answer unknown paths with a web page
        url = session.next_page(reply)
        if not url:
            break
    return rows


def _by_tag(session: RegistrySession, reference: Reference, tag: str) -> list[JsonValue] | None:
    """Return the list under a tag, or None if the tag is an image: `cosign copy` leaves such."""
    target = Reference(reference.registry, reference.repository, tag)
    found = transfers.manifest_or_none(session, target)
    if found is None:
        return []
    body, kind = found
    if kind not in manifests.INDEXES or fallback_tag(Digest.of(body)) == tag:
        return None
    return manifests.listed(manifests.read_json(body, str(target)), "manifests", str(target))


_HINT = "give the folder that `--layout` wrote, or an image reference"


@dataclass(frozen=True, slots=True)
class RegistryLocation:
    """An image in a registry."""

    registry: Registry
    reference: Reference
    every: bool = False
    """Whether an attachment that is listed is looked for all the same, and sent if it is gone."""

    def image(self, platform: str | None = None) -> Image:
        """Return the image for a platform (default: this one)."""
        return self.registry.pull(self.reference, platform=platform)

    def index(self) -> bytes | None:
        """Return the index of the reference, or None if it is an image."""
        body, kind = self.registry.read_manifest(self.reference)
        return body if kind in manifests.INDEXES else None

    def attached(self, subject: Digest) -> list[tuple[Blob, str]]:
        """Return the manifests attached to an image, each with its tag or an empty one.

        With `every`, only those that are really there: a registry may lose what it still lists.
        """
        listed = self.registry.attached(self.reference, subject)
        if not self.every:
            return listed
        asked, there = self.reference, self.registry.digest_of
        return [(blob, tag) for blob, tag in listed if there(asked.at(blob.digest))]

    def read(self, blob: Blob, tag: str = "") -> Attachment:
        """Return an attachment; raises Altered if it does not match its digest."""
        return self.registry.read_attachment(self.reference, blob, tag)

    def attach(self, *attachments: Attachment) -> None:
        """Store attachments with their image."""
        self.registry.attach(self.reference, *attachments, every=self.every)


ImageLocation: TypeAlias = RegistryLocation | LayoutLocation
"""An image and its attachments, read on demand."""


def open_location(source: str, registry: Registry) -> ImageLocation:
    """Return the location of a layout folder (`[oci:]DIR[:NAME]`) or a registry reference.

    Raises InputRefused for a folder that is not there or not a layout, UsageError for what is
    neither path nor reference.
    """
    if is_layout(source):
        folder, name = locate(source)
        require_layout(folder)
        return LayoutLocation(folder, name)
    if source.strip() and Path(source).is_dir():
        raise InputRefused(f"{source} is a folder, but not an OCI layout", hint=_HINT)
    return RegistryLocation(registry, reference_of(source))


def reference_of(source: str) -> Reference:
    """Return the reference of an image that is no layout.

    Raises InputRefused if the user means a path, which no registry should be asked for, UsageError
    for what is neither path nor reference.
    """
    if source.startswith((".", "/", "~")) or source.endswith("/"):
        why = "is not an OCI layout" if Path(source).exists() else "does not exist"
        raise InputRefused(f"{source} {why}", hint=_HINT)
    try:
        return Reference.parse(source)
    except UsageError as error:
        # A path has a separator, and does not begin with a registry.
        first, slash, _ = source.partition("/")
        if not slash or any(character in first for character in ".:@"):
            raise
        raise InputRefused(f"{source} does not exist, and {error.message}", hint=_HINT) from None
