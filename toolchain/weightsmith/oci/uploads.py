"""Uploads blobs and manifests to a registry; blobs are skipped, mounted or streamed.

What a tag names is there: a registry takes a manifest after its blobs, and our tag comes last. So
if the tag already names the image, its layers are not looked for, and the tag is not written again,
which registries with immutable tags refuse: four or five requests instead of twenty-three.
`--force` looks for everything.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextlib import suppress
from enum import Enum
from typing import TypeAlias, TypeVar
from urllib.parse import quote

from weightsmith.core.errors import EnvironmentFailure, UsageError, WeightsmithError
from weightsmith.core.values import Blob, Digest
from weightsmith.oci import downloads
from weightsmith.oci.image import Image, Opener, blob_of
from weightsmith.oci.layers import BlobLayer, Layer, TarLayer, verified
from weightsmith.oci.progress import Advance, Meter
from weightsmith.oci.references import Reference
from weightsmith.oci.replies import RegistryReply, Transient
from weightsmith.oci.sending import check_created, send
from weightsmith.oci.session import RegistrySession
from weightsmith.oci.upload_deadline import UploadDeadline

T = TypeVar("T")
_OK, _CREATED, _ACCEPTED, _MISSING, _KIND = 200, 201, 202, 404, 415
_FEW = 3
"""Tries of the first request: enough for a hiccup, few enough to wait for."""


Elsewhere: TypeAlias = Callable[[Blob], tuple[RegistrySession, str] | None]
"""Blob -> a session for another repository that had it, and that repository; or None."""


class Transfer(Enum):
    """How a blob got into the repository."""

    THERE = "there"
    MOUNTED = "mounted"
    SENT = "sent"


class _Stopped(Exception):
    """Another upload failed, or the user stopped the push."""


def mount_sources(image: Image, reference: Reference, more: Sequence[str]) -> tuple[str, ...]:
    """Return the repositories of the same registry that may have some of the layers."""
    found = {
        layer.origin.repository: None
        for layer in image.layers
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
    parallel: int,
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


def checked_opener(layer: Layer, blob: Blob) -> Opener:
    """Return an opener that verifies the layer: not every registry compares the digest."""
    known = isinstance(layer, BlobLayer) or (isinstance(layer, TarLayer) and layer.is_as_hashed())
    if known:
        return layer.open  # verified when it is read, or just hashed
    what = layer.file or "a layer"
    hint = "a file changed since it was hashed; build again"
    return lambda: verified(layer.open(), blob, what, hint)


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
        if held is None and elsewhere and (other := elsewhere(blob)) and _mounted(*other, blob):
            return Transfer.MOUNTED
        opened = _mount(session, blob, sources if held is None else ())
        if opened is None:
            return Transfer.MOUNTED
        send(session, blob, body, opened, what)
        if held is not None and _held(session, blob, what) != blob.size:
            raise _damaged(session, blob, held, what)
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


def _damaged(session: RegistrySession, blob: Blob, held: int, what: str) -> EnvironmentFailure:
    return EnvironmentFailure(
        f"{what}: {session.registry} has only {held} of its {blob.size} bytes under that digest "
        "and does not replace them",
        hint="delete the blob there, or push to another repository",
    )


def try_upload(session: RegistrySession, where: str) -> None:
    """Open and cancel an upload; raises what a push would, in seconds instead of minutes."""
    what = f"cannot push to {where}"
    headers = {"Content-Length": "0"}
    opened = session.attempt(
        what, lambda: session.call("POST", "blobs/uploads/", headers=headers), tries=_FEW
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
    found, digest = downloads.digest_of(session, reference), Digest.of(manifest)
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


def _mount(session: RegistrySession, blob: Blob, sources: Sequence[str]) -> RegistryReply | None:
    """Return None if the blob was mounted, else the reply that opened an upload session."""
    for source in sources:
        url = f"blobs/uploads/?mount={blob.digest}&from={quote(source, safe='')}"
        reply = session.call("POST", url, headers={"Content-Length": "0"})
        if reply.status == _CREATED:
            return None
        if reply.status == _ACCEPTED:
            # Not mounted: an upload session was opened, which the next request replaces.
            session.call("DELETE", session.location(reply))
    return session.call("POST", "blobs/uploads/", headers={"Content-Length": "0"})


def _mounted(session: RegistrySession, source: str, blob: Blob) -> bool:
    """Say whether a blob was mounted from an earlier repository; it may be gone, or private."""
    url = f"blobs/uploads/?mount={blob.digest}&from={quote(source, safe='')}"
    try:
        reply = session.call("POST", url, headers={"Content-Length": "0"})
        if reply.status == _ACCEPTED and reply.headers.get("location"):
            session.call("DELETE", session.location(reply))
    except (Transient, WeightsmithError):
        return False
    return reply.status == _CREATED
