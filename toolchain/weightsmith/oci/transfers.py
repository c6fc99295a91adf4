"""Moves blobs and manifests to a registry and back; blobs are skipped, mounted or streamed.

What is downloaded is verified.

What a tag names is there: a registry takes a manifest after its blobs, and our tag comes last. So
if the tag already names the image, its layers are not looked for, and the tag is not written again,
which registries with immutable tags refuse: four or five requests instead of twenty-three.
`--force` looks for everything.

A layer whose digest was not just computed is hashed while it is sent, and its last chunk goes only
if the digest is right: Pulp accepts a blob under any digest, and takes what arrived of an
interrupted PUT for complete. So a large layer is sent with PATCH and then finished, as Docker does.
https://github.com/opencontainers/distribution-spec/blob/main/spec.md#push
"""

from __future__ import annotations

import queue
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextlib import suppress
from enum import Enum
from functools import partial
from typing import TypeAlias, TypeVar
from urllib.parse import quote

from weightsmith.core.errors import Altered, EnvironmentFailure, UsageError, WeightsmithError
from weightsmith.core.values import Blob, Digest
from weightsmith.oci import connections, manifests
from weightsmith.oci.attachments import BINARY
from weightsmith.oci.image import Image, Opener, blob_of
from weightsmith.oci.layers import CHUNK, Advance, BlobLayer, Layer, Meter, checked_opener, verified
from weightsmith.oci.limits import UploadDeadline, limits_of
from weightsmith.oci.references import Reference
from weightsmith.oci.session import TRIES, RegistryReply, RegistrySession, Transient

T = TypeVar("T")
_ACCEPT = {"Accept": ", ".join((*manifests.MANIFESTS, *manifests.INDEXES))}
_OK, _CREATED, _ACCEPTED, _NO_CONTENT, _PARTIAL = 200, 201, 202, 204, 206
_BAD, _MISSING, _TOO_LARGE, _KIND, _OUT_OF_STEP = 400, 404, 413, 415, 416
_SUCCEEDED = (_ACCEPTED, _NO_CONTENT, _CREATED)
"""Replies to a chunk: the specification's, and those of registries that differ."""
_NO_PARTS = (_MISSING, 405, 501)
"""Replies of registries that accept a blob only in one request."""
_CHUNK = 32 << 20
_LARGEST_CHUNK = 256 << 20
_SMALL = 1 << 20
"""Bytes; up to this size a blob is sent in one PUT. A larger one is sent by PATCH and finished by
PUT, as Docker does: Pulp stores what arrived of a broken PUT as if it were the whole blob."""
_FEW = 3
"""Tries of the first request, and of asking how much was kept: enough for a hiccup."""
_FINISH = 1800
"""Seconds that a registry may take after the last byte; some copy a layer to another store."""
_EMPTY = {"Content-Length": "0"}

Elsewhere: TypeAlias = Callable[[Blob], tuple[RegistrySession, str] | None]
"""Blob -> a session for another repository that had it, and that repository; or None."""


class Transfer(Enum):
    """How a blob got into the repository."""

    THERE = "there"
    MOUNTED = "mounted"
    SENT = "sent"


class _Stopped(Exception):
    """Another upload failed, or the user stopped the push."""


def mount_sources(
    layers: Sequence[Layer], reference: Reference, more: Sequence[str]
) -> tuple[str, ...]:
    """Return the repositories of the same registry that may have some of the layers."""
    found = {
        layer.origin.repository: None
        for layer in layers
        if isinstance(layer, BlobLayer)
        and layer.origin
        and layer.origin.registry == reference.registry
    }
    return tuple(name for name in {**found, **dict.fromkeys(more)} if name != reference.repository)


def upload_layers(
    session: RegistrySession,
    image: Image,
    sources: Sequence[str],
    progress: Advance | None,
    parallel: int,
    elsewhere: Elsewhere | None = None,
    *,
    deadline: UploadDeadline,
) -> list[tuple[Transfer, int]]:
    """Upload every layer and the configuration; return how, and the bytes, for each.

    A layer that must be hashed first is hashed in its own thread, during other uploads.
    """

    def ready(layer: Layer) -> tuple[Blob, Opener]:
        blob = blob_of(layer)
        return blob, deadline.over(checked_opener(layer, blob), blob.size, layer.file)

    meter = Meter(sum(layer.size for layer in image.layers), progress)
    sent = upload_each(session, image.layers, ready, sources, meter, parallel, elsewhere)
    config = image.config_blob
    transfer = upload_blob(session, config, lambda: iter((image.config_bytes,)))
    return [*sent, (transfer, config.size)]


def upload_each(
    session: RegistrySession,
    items: Sequence[T],
    ready: Callable[[T], tuple[Blob, Opener]],
    sources: Sequence[str],
    meter: Meter,
    parallel: int = 4,
    elsewhere: Elsewhere | None = None,
) -> list[tuple[Transfer, int]]:
    """Upload blobs in parallel; if one fails, the others stop.

    `ready` returns an item's blob and opener; it is called in the thread that uploads it.
    """
    stop = threading.Event()

    def work(item: T) -> tuple[Transfer, int]:
        if stop.is_set():
            raise _Stopped
        blob, opener = ready(item)
        return upload_blob(session, blob, opener, sources, meter, stop, elsewhere), blob.size

    futures = _started(work, items, max(1, parallel))
    try:
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()
    except BaseException:
        stop.set()
        for future in futures:
            future.cancel()
        wait(futures)
        raise
    return [future.result() for future in futures]


def _started(
    work: Callable[[T], tuple[Transfer, int]], items: Sequence[T], parallel: int
) -> list[Future[tuple[Transfer, int]]]:
    """Start the work on each item, on so many threads.

    They are daemons, unlike those of a ThreadPoolExecutor: a process does not wait at its end for
    an upload that was given up, to a registry that takes nothing more.
    """
    waiting: queue.SimpleQueue[tuple[Future[tuple[Transfer, int]], T]] = queue.SimpleQueue()
    futures: list[Future[tuple[Transfer, int]]] = []
    for item in items:
        futures.append(Future())
        waiting.put((futures[-1], item))

    def run() -> None:
        while True:
            try:
                future, item = waiting.get_nowait()
            except queue.Empty:
                return
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(work(item))
                except BaseException as error:  # noqa: BLE001 - raised where it is waited for
                    future.set_exception(error)

    for _ in range(min(parallel, len(items))):
        threading.Thread(target=run, daemon=True, name="upload").start()
    return futures


def upload_blob(
    session: RegistrySession,
    blob: Blob,
    opener: Opener,
    sources: Sequence[str] = (),
    meter: Meter | None = None,
    stop: threading.Event | None = None,
    elsewhere: Elsewhere | None = None,
) -> Transfer:
    """Upload a blob, unless the repository has it.

    A broken upload is resumed if the registry kept its data, else it starts again.
    """
    meter = meter or Meter(blob.size)
    what = f"cannot upload the blob {blob.digest.short}"

    def body() -> Iterator[bytes]:
        for chunk in meter.counted(blob.digest, opener()):
            if stop and stop.is_set():
                raise _Stopped
            yield chunk

    def once() -> Transfer:
        held = _held(session, blob, what)
        if held == blob.size:
            return Transfer.THERE
        if held is None:
            if elsewhere and (other := elsewhere(blob)):
                # It may be gone from there, or private.
                with suppress(Transient, WeightsmithError):
                    if _is_mounted(*other, blob):
                        return Transfer.MOUNTED
            if any(_is_mounted(session, source, blob) for source in sources):
                return Transfer.MOUNTED
        opened = session.call("POST", "blobs/uploads/", headers=_EMPTY)
        send(session, blob, body, opened, what)
        if held is not None and _held(session, blob, what) != blob.size:
            raise EnvironmentFailure(
                f"{what}: {session.registry} has only {held} of its {blob.size} bytes under that "
                "digest and does not replace them",
                hint="delete the blob there, or push to another repository",
            )
        return Transfer.SENT

    transfer = session.attempt(what, once)
    meter.reach(blob.digest, blob.size)
    return transfer


def has(session: RegistrySession, blob: Blob) -> bool:
    """Say whether the repository has a blob; asks only."""
    what = f"cannot look for the blob {blob.digest.short}"
    return session.attempt(what, lambda: _held(session, blob, what)) == blob.size


def _held(session: RegistrySession, blob: Blob, what: str) -> int | None:
    """Return the size of the blob in the repository, or None if it has no such blob.

    A registry may have stored part of a broken upload as if it were complete.
    """
    url = f"blobs/{blob.digest}"
    found = session.call("HEAD", url)
    if found.status == _MISSING:
        return None
    if found.status != _OK:
        raise session.refusal(what, found)
    if found.headers.get("content-length") in (None, str(blob.size)):
        return blob.size
    # Some registries send a wrong length with HEAD; of this GET only the headers are read.
    with session.stream("GET", url) as reply:
        length = reply.headers.get("content-length", "") if reply.status_code == _OK else "0"
    return int(length) if length.isascii() and length.isdigit() else blob.size


def try_upload(session: RegistrySession, where: str) -> None:
    """Open and cancel an upload; raises what a push would, in seconds instead of minutes."""
    what = f"cannot push to {where}"
    opened = session.attempt(
        what, lambda: session.call("POST", "blobs/uploads/", headers=_EMPTY), tries=_FEW
    )
    if opened.status != _ACCEPTED:
        raise session.refusal(what, opened)
    if opened.headers.get("location"):
        # Some registries cannot cancel uploads; those expire.
        with suppress(Transient):
            session.call("DELETE", session.location(opened))


def put_manifest(
    session: RegistrySession, name: str, manifest: bytes, media_type: str
) -> RegistryReply:
    """Put a manifest under a digest or a tag; raises Altered if another digest comes back."""
    what = f"cannot put the manifest {name}"
    headers = {"Content-Type": media_type}
    reply = session.attempt(
        what, lambda: session.call("PUT", f"manifests/{name}", headers=headers, body=manifest)
    )
    if reply.status == _KIND or b"MANIFEST_INVALID" in reply.body:
        kind = "manifests with a subject (OCI 1.1)" if b'"subject"' in manifest else "OCI manifests"
        raise EnvironmentFailure(
            f"{what}: {session.explain(reply)}",
            hint=f"check that the registry supports {kind}; older versions of some do not",
        )
    check_created(session, reply, Digest.of(manifest), what)
    return reply


def put_tag(
    session: RegistrySession, reference: Reference, manifest: bytes, media_type: str, *, force: bool
) -> None:
    """Put a manifest under a tag; UsageError if it names another digest, unless `force`.

    The tag is read again, since others may have pushed during a long upload. A tag that names this
    digest is not put again: Amazon ECR and Harbor refuse even that if tags are immutable.
    """
    found, digest = digest_of(session, reference), Digest.of(manifest)
    if found and found != digest and not force:
        raise tag_conflict(reference, found)
    if found != digest and reference.tag:
        put_manifest(session, reference.tag, manifest, media_type)


def tag_conflict(reference: Reference, found: Digest) -> UsageError:
    """Return the error for a tag that names another image."""
    return UsageError(
        f"{reference} already exists and is another image ({found.short})",
        hint="choose another tag, or pass --force to move this one",
    )


def _is_mounted(session: RegistrySession, source: str, blob: Blob) -> bool:
    url = f"blobs/uploads/?mount={blob.digest}&from={quote(source, safe='')}"
    reply = session.call("POST", url, headers=_EMPTY)
    if reply.status == _ACCEPTED:
        # Not mounted: an upload session was opened, which the next request replaces.
        session.call("DELETE", session.location(reply))
    return reply.status == _CREATED


def send(
    session: RegistrySession, blob: Blob, body: Opener, opened: RegistryReply, what: str
) -> None:
    """Send a blob into the upload session of the reply `opened`; `what` begins error messages.

    Raises Transient if a retry may help, Altered if other bytes arrived.
    """
    if opened.status != _ACCEPTED:
        raise session.refusal(what, opened)
    least = opened.headers.get("oci-chunk-min-length", "")
    size = max(int(least), _CHUNK) if least.isascii() and least.isdigit() else 0
    if size and blob.size <= int(least):
        size = 0
    reply, resumed = _persistently(session, blob, body, opened, size, what)
    limits = limits_of(session.registry)
    whole_only = limits is not None and limits.in_one_piece
    if reply.status == _TOO_LARGE and not size and blob.size > _CHUNK and not whole_only:
        again = session.call("POST", "blobs/uploads/", headers=_EMPTY)
        if again.status != _ACCEPTED:
            raise session.refusal(what, again)
        reply, resumed = _persistently(session, blob, body, again, _CHUNK, what)
    if reply.status in (_MISSING, _OUT_OF_STEP):
        # The registry lost the session, as after a restart.
        raise Transient(session.explain(reply))
    if reply.status == _BAD and b"DIGEST_INVALID" in reply.body:
        if resumed:
            raise Transient("the registry lost data that it had confirmed")
        raise Altered(
            f"{what}: {session.explain(reply)}: the data that arrived does not match the digest",
            hint=f"the data was correct when it was sent: {altered_hint(session)}",
        )
    check_created(session, reply, blob.digest, what)


def _persistently(
    session: RegistrySession, blob: Blob, body: Opener, opened: RegistryReply, size: int, what: str
) -> tuple[RegistryReply, bool]:
    """Send a blob in chunks of `size` bytes (0: whole), and resume broken connections.

    Return the last reply, and whether anything was resumed. Raises Transient if the registry
    kept nothing.
    """
    at, upload = 0, opened
    while True:
        try:
            if size:
                return _in_chunks(session, body, upload, blob, size, at), at > 0
            if at or blob.size > _SMALL:
                reply = _rest(session, body, upload, blob, at)
                if at or reply.status not in _NO_PARTS:
                    return reply, at > 0
            headers = {"Content-Length": str(blob.size), "Content-Type": BINARY}
            url = _finishing(session.location(upload), blob)
            return session.call("PUT", url, headers=headers, body=body, wait=_FINISH), False
        except Transient as trouble:
            kept = _bytes_kept(session, upload)
            if kept is None or not at < kept[0] <= blob.size:
                raise
            # There was progress, so it will end: count the tries anew.
            session.wait_after(what, trouble, 1)
            at, upload = kept


def _bytes_kept(
    session: RegistrySession, opened: RegistryReply
) -> tuple[int, RegistryReply] | None:
    """Return how many bytes of an upload the registry has, and its reply; None if none.

    https://github.com/opencontainers/distribution-spec/blob/main/spec.md#resuming-an-upload
    """
    try:
        url = session.location(opened)
        reply = session.attempt("", lambda: session.call("GET", url), tries=_FEW)
    except (WeightsmithError, Transient):
        return None
    found = re.fullmatch(r"(?:bytes=)?0-(\d{1,18})", reply.headers.get("range", ""))
    if reply.status not in (_OK, _NO_CONTENT) or found is None or int(found[1]) == 0:
        return None
    return int(found[1]) + 1, reply if reply.headers.get("location") else opened


def _rest(
    session: RegistrySession, body: Opener, upload: RegistryReply, blob: Blob, at: int
) -> RegistryReply:
    if at == blob.size:
        return _finish(session, upload, blob)
    reply = _patch(session, upload, at, blob.size - at, lambda: after(body(), at), whole=not at)
    return _finish(session, reply, blob) if reply.status in _SUCCEEDED else reply


def _in_chunks(
    session: RegistrySession, body: Opener, upload: RegistryReply, blob: Blob, size: int, at: int
) -> RegistryReply:
    """Send what follows `at` bytes in chunks, for registries that refuse large bodies.

    A chunk is held in memory, since it may have to be sent again with another token.
    """
    reply = upload
    for piece in _pieces(after(body(), at), min(size, _LARGEST_CHUNK)):
        length = sum(map(len, piece))
        reply = _patch(session, reply, at, length, lambda piece=piece: iter(piece))  # type: ignore[misc]
        if reply.status not in _SUCCEEDED:
            return reply
        at += length
    return _finish(session, reply, blob)


def _patch(
    session: RegistrySession,
    upload: RegistryReply,
    at: int,
    length: int,
    body: Opener,
    *,
    whole: bool = False,
) -> RegistryReply:
    headers = {"Content-Length": str(length), "Content-Type": BINARY}
    if not whole:
        # Registries without chunked uploads accept a whole blob if there is no Content-Range.
        headers["Content-Range"] = f"{at}-{at + length - 1}"
    return session.call("PATCH", session.location(upload), headers=headers, body=body, wait=_FINISH)


def _finish(session: RegistrySession, upload: RegistryReply, blob: Blob) -> RegistryReply:
    url = _finishing(session.location(upload), blob)
    return session.call("PUT", url, headers=_EMPTY, wait=_FINISH)


def _pieces(chunks: Iterator[bytes], size: int) -> Iterator[list[bytes]]:
    """Group chunks into pieces of `size` bytes, the last one shorter."""
    held: list[bytes] = []
    room = size
    for chunk in chunks:
        rest = chunk
        while rest:
            held.append(rest[:room])
            rest = rest[len(held[-1]) :]
            room -= len(held[-1])
            if not room:
                yield held
                held, room = [], size
    if held:
        yield held


def _finishing(location: str, blob: Blob) -> str:
    # Joined as text: some registries sign their own query, which must stay unchanged.
    return f"{location}{'&' if '?' in location else '?'}digest={quote(blob.digest, safe='')}"


def check_created(
    session: RegistrySession, reply: RegistryReply, digest: Digest, what: str
) -> None:
    """Raise an error unless a reply confirms that content with this digest was created."""
    if reply.status not in (_OK, _CREATED, _ACCEPTED):
        raise session.refusal(what, reply)
    there = declared_digest(reply, session.registry)
    if there and there != digest:
        raise Altered(
            f"{what}: {session.registry} stored {there.short} instead",
            hint=altered_hint(session),
        )


def digest_of(session: RegistrySession, reference: Reference, tries: int = TRIES) -> Digest | None:
    """Return the digest that a tag or digest resolves to now, or None if it does not exist."""
    name = reference.digest or reference.tag
    what = f"cannot look up {reference}"
    reply = session.attempt(
        what, lambda: session.call("HEAD", f"manifests/{name}", headers=_ACCEPT), tries
    )
    if reply.status == _MISSING:
        return None
    if reply.status != _OK:
        raise session.refusal(what, reply)
    # The header is optional in the specification; without it, hash the manifest.
    return declared_digest(reply, str(reference)) or Digest.of(manifest(session, reference)[0])


def manifest(session: RegistrySession, reference: Reference) -> tuple[bytes, str]:
    """Return a manifest's or index's bytes and media type; Altered for a wrong digest."""
    return _checked(session, _ask(session, reference, TRIES), reference)


def manifest_or_none(
    session: RegistrySession, reference: Reference, tries: int = TRIES
) -> tuple[bytes, str] | None:
    """Return the same, or None if the name does not exist."""
    reply = _ask(session, reference, tries)
    return None if reply.status == _MISSING else _checked(session, reply, reference)


def _ask(session: RegistrySession, reference: Reference, tries: int) -> RegistryReply:
    name = reference.digest or reference.tag
    return session.attempt(
        f"cannot read {reference}",
        lambda: session.call(
            "GET", f"manifests/{name}", headers=_ACCEPT, limit=manifests.LARGEST_MANIFEST
        ),
        tries,
    )


def _checked(
    session: RegistrySession, reply: RegistryReply, reference: Reference
) -> tuple[bytes, str]:
    if reply.status != _OK:
        raise session.refusal(f"cannot read {reference}", reply)
    digest = Digest.of(reply.body)
    if {reference.digest or digest, declared_digest(reply, str(reference)) or digest} != {digest}:
        raise Altered(
            f"{reference}: the registry sent a manifest with the wrong digest ({digest.short})",
            hint=altered_hint(session),
        )
    kind = reply.headers.get("content-type", "").partition(";")[0].strip()
    if kind not in (*manifests.MANIFESTS, *manifests.INDEXES):
        kind = str(manifests.read_json(reply.body, str(reference)).get("mediaType", kind))
    return reply.body, kind


def blob(session: RegistrySession, wanted: Blob) -> Iterator[bytes]:
    """Yield a blob in chunks of about 1 MiB; a broken connection is resumed.

    Raises Altered at the end if the content does not match the digest.
    """
    chunks = _resumed(session, wanted)
    hint = partial(altered_hint, session)  # not asked for each blob: it reads the environment
    return verified(chunks, wanted, session.registry, hint, Altered)


def blob_from(session: RegistrySession, wanted: Blob, start: int) -> Iterator[bytes]:
    """Yield a blob's bytes from an offset on, which the caller verifies; resumed as in `blob`."""
    return _resumed(session, wanted, start)


def altered_hint(session: RegistrySession) -> str:
    """Return the hint for data that was changed on its way here."""
    proxy = connections.display_proxy(session.root)
    who = f"the proxy {proxy} or the registry" if proxy else "the registry or a proxy before it"
    return f"try again; if it happens again, {who} changes the data: ask its administrator"


def declared_digest(reply: RegistryReply, where: str) -> Digest | None:
    """Return the digest in the reply's header, or None without the header."""
    text = reply.headers.get("docker-content-digest", "")
    try:
        return Digest(text) if text else None
    except ValueError:
        raise Altered(
            f"{where}: the registry sent a malformed digest",
            hint="try again; if it happens again, ask the administrator of the registry",
        ) from None


def _resumed(session: RegistrySession, wanted: Blob, at: int = 0) -> Iterator[bytes]:
    failures = 0
    while at < wanted.size:
        # Some registries refuse a range without an end, though RFC 9110 allows it.
        headers = {"Range": f"bytes={at}-{wanted.size - 1}"} if at else {}
        try:
            with session.stream("GET", f"blobs/{wanted.digest}", headers=headers) as response:
                if response.status_code not in (_OK, _PARTIAL):
                    session.check(f"cannot read the blob {wanted.digest.short}", response)
                skip = at if response.status_code == _OK else 0
                for chunk in after(response.iter_raw(CHUNK), skip):
                    at += len(chunk)
                    failures = 0
                    yield chunk
            if at < wanted.size:
                raise Transient("the connection ended early")
        except Transient as trouble:
            failures += 1
            what = f"cannot read the blob {wanted.digest.short} from {session.registry}"
            session.wait_after(what, trouble, failures)


def after(chunks: Iterator[bytes], at: int) -> Iterator[bytes]:
    """Skip the first `at` bytes."""
    for chunk in chunks:
        rest = chunk[at:]
        at -= len(chunk) - len(rest)
        if rest:
            yield rest
