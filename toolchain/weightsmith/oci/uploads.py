"""The writing half of the distribution protocol: blobs skipped, mounted or streamed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import suppress
from enum import Enum
from typing import TypeAlias, TypeVar
from urllib.parse import quote

from weightsmith.errors import EnvironmentFailure, UsageError, WeightsmithError
from weightsmith.oci import downloads
from weightsmith.oci.image import Image, Opener, blob_of
from weightsmith.oci.layers import BlobLayer, Layer, TarLayer, verified
from weightsmith.oci.progress import Advance, Meter
from weightsmith.oci.references import Reference
from weightsmith.oci.replies import Reply, Transient
from weightsmith.oci.sending import check_created, send
from weightsmith.oci.session import RegistrySession
from weightsmith.oci.upload_deadline import UploadDeadline
from weightsmith.values import Blob, Digest

T = TypeVar("T")
_OK, _CREATED, _ACCEPTED, _MISSING, _KIND = 200, 201, 202, 404, 415
_FEW = 3
"""Tries of a first look: long enough for a hiccup, short enough to wait for."""


Elsewhere: TypeAlias = Callable[[Blob], tuple[RegistrySession, str] | None]
"""Blob -> a repository that had it before, and a conversation that may ask there; or None."""


class Way(Enum):
    """How a blob got there."""

    THERE = "there"
    MOUNTED = "mounted"
    SENT = "sent"


class _Stopped(Exception):
    """Another blob failed, or the user stopped the push."""


def mount_sources(image: Image, reference: Reference, more: Sequence[str]) -> tuple[str, ...]:
    """Return the repositories of the same registry that may hold some of the layers."""
    found = {
        layer.origin.repository: None
        for layer in image.layers
        if isinstance(layer, BlobLayer)
        and layer.origin
        and layer.origin.registry == reference.registry
    }
    return tuple(name for name in {**found, **dict.fromkeys(more)} if name != reference.repository)


def bring_all(
    session: RegistrySession,
    image: Image,
    sources: Sequence[str],
    progress: Advance | None,
    parallel: int,
    elsewhere: Elsewhere | None = None,
    *,
    deadline: UploadDeadline,
) -> list[tuple[Way, int]]:
    """Bring every layer and the configuration there; return how, and the bytes of each.

    A layer that has to be hashed first is hashed in its own thread, beside other uploads.
    """

    def ready(layer: Layer) -> tuple[Blob, Opener]:
        blob = blob_of(layer)
        return blob, deadline.over(_opener(layer, blob), blob.size, layer.file)

    meter = Meter(sum(layer.size for layer in image.layers), progress)
    sent = bring_each(session, image.layers, ready, sources, meter, parallel, elsewhere)
    config = image.config_blob
    way = bring(session, config, lambda: iter((image.config_bytes,)))
    return [*sent, (way, config.size)]


def bring_each(
    session: RegistrySession,
    things: Sequence[T],
    ready: Callable[[T], tuple[Blob, Opener]],
    sources: Sequence[str],
    meter: Meter,
    parallel: int,
    elsewhere: Elsewhere | None = None,
) -> list[tuple[Way, int]]:
    """Bring blobs there, some at a time; where one fails, the others stop.

    `ready` tells what a thing's blob is, in the thread that sends it.
    """
    stop = threading.Event()

    def work(thing: T) -> tuple[Way, int]:
        if stop.is_set():
            raise _Stopped
        blob, opener = ready(thing)
        return bring(session, blob, opener, sources, meter, stop, elsewhere), blob.size

    with ThreadPoolExecutor(max(1, parallel)) as pool:
        futures = [pool.submit(work, thing) for thing in things]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        except BaseException:
            # The pool waits for its threads, so they have to be told.
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [future.result() for future in futures]


def _opener(layer: Layer, blob: Blob) -> Opener:
    """Return what yields the layer's bytes, checked: not every registry compares the digest."""
    known = isinstance(layer, BlobLayer) or (isinstance(layer, TarLayer) and layer.is_as_hashed())
    if known:
        return layer.open  # checked where it is read, or a moment ago
    what = layer.file or "a layer"
    hint = "a file changed since it was hashed; build again"
    return lambda: verified(layer.open(), blob, what, hint)


def bring(
    session: RegistrySession,
    blob: Blob,
    opener: Opener,
    sources: Sequence[str] = (),
    meter: Meter | None = None,
    stop: threading.Event | None = None,
    elsewhere: Elsewhere | None = None,
) -> Way:
    """Make sure that the repository holds the blob.

    A broken upload goes on where the registry kept what came, else it starts again.
    """
    meter = meter or Meter(blob.size)
    what = f"cannot upload the blob {blob.digest.short}"

    def body() -> Iterator[bytes]:
        for chunk in meter.counted(blob.digest, opener()):
            if stop and stop.is_set():
                raise _Stopped
            yield chunk

    def once() -> Way:
        held = _held(session, blob, what)
        if held == blob.size:
            return Way.THERE
        if held is None and elsewhere and (place := elsewhere(blob)) and _mounted(*place, blob):
            return Way.MOUNTED
        opened = _mount(session, blob, sources if held is None else ())
        if opened is None:
            return Way.MOUNTED
        send(session, blob, body, opened, what)
        if held is not None and _held(session, blob, what) != blob.size:
            raise _damaged(session, blob, held, what)
        return Way.SENT

    way = session.attempt(what, once)
    meter.reach(blob.digest, blob.size)
    return way


def _held(session: RegistrySession, blob: Blob, what: str) -> int | None:
    """Return how many bytes the repository has under the digest, or None where it has no such blob.

    A registry may have kept a part of a broken upload as if it were all.
    """
    url = f"blobs/{blob.digest}"
    found = session.call("HEAD", url)
    if found.status == _MISSING:
        return None
    if found.status != _OK:
        raise session.refusal(what, found)
    if found.headers.get("content-length") in (None, str(blob.size)):
        return blob.size
    # Some answer HEAD with another length than GET, of which only the head is read here.
    with session.stream("GET", url) as reply:
        length = reply.headers.get("content-length", "") if reply.status_code == _OK else "0"
    return int(length) if length.isascii() and length.isdigit() else blob.size


def _damaged(session: RegistrySession, blob: Blob, held: int, what: str) -> EnvironmentFailure:
    return EnvironmentFailure(
        f"{what}: {session.registry} holds {held} of its {blob.size} bytes under that digest, "
        "and keeps them",
        hint="delete the blob there, or push to another repository",
    )


def try_upload(session: RegistrySession, where: str) -> None:
    """Open an upload and give it up; raises what a push would, after seconds and not minutes."""
    what = f"cannot push to {where}"
    headers = {"Content-Length": "0"}
    opened = session.attempt(
        what, lambda: session.call("POST", "blobs/uploads/", headers=headers), tries=_FEW
    )
    if opened.status != _ACCEPTED:
        raise session.refusal(what, opened)
    if opened.headers.get("location"):
        # Some registries cannot cancel, and forget uploads by themselves.
        with suppress(Transient):
            session.call("DELETE", session.location(opened))


def put_manifest(session: RegistrySession, name: str, manifest: bytes, media_type: str) -> Reply:
    """Put a manifest under a digest or a tag; Altered if another digest comes back."""
    what = f"cannot put the manifest {name}"
    headers = {"Content-Type": media_type}
    reply = session.attempt(
        what, lambda: session.call("PUT", f"manifests/{name}", headers=headers, body=manifest)
    )
    if reply.status == _KIND or b"MANIFEST_INVALID" in reply.body:
        kind = "that hang on others (OCI 1.1)" if b'"subject"' in manifest else "of OCI's kind"
        raise EnvironmentFailure(
            f"{what}: {session.explain(reply)}",
            hint=f"does this registry take manifests {kind}? Older versions of some do not",
        )
    check_created(session, reply, Digest.of(manifest), what)
    return reply


def put_tag(
    session: RegistrySession, place: Reference, manifest: bytes, media_type: str, *, force: bool
) -> None:
    """Put a manifest under a tag; UsageError where it names another and `force` is false.

    Asked anew, since others push during a long upload. Left out where it names this one: Amazon
    ECR and Harbor refuse that, too, for a tag that is immutable.
    """
    found, digest = downloads.digest_of(session, place), Digest.of(manifest)
    if found and found != digest and not force:
        raise taken(place, found)
    if found != digest and place.tag:
        put_manifest(session, place.tag, manifest, media_type)


def taken(reference: Reference, found: Digest) -> UsageError:
    """Return the error for a tag that names another image."""
    return UsageError(
        f"{reference} exists and is another image ({found.short})",
        hint="choose another tag, or pass --force to move this one",
    )


def _mount(session: RegistrySession, blob: Blob, sources: Sequence[str]) -> Reply | None:
    """Return None if the blob was mounted, else the reply that opened an upload."""
    for source in sources:
        url = f"blobs/uploads/?mount={blob.digest}&from={quote(source, safe='')}"
        reply = session.call("POST", url, headers={"Content-Length": "0"})
        if reply.status == _CREATED:
            return None
        if reply.status == _ACCEPTED:
            # Not there: an upload was opened instead, which the next question replaces.
            session.call("DELETE", session.location(reply))
    return session.call("POST", "blobs/uploads/", headers={"Content-Length": "0"})


def _mounted(session: RegistrySession, source: str, blob: Blob) -> bool:
    """Say whether a blob was mounted from where it was once pushed; it may be gone, or private."""
    url = f"blobs/uploads/?mount={blob.digest}&from={quote(source, safe='')}"
    try:
        reply = session.call("POST", url, headers={"Content-Length": "0"})
        if reply.status == _ACCEPTED and reply.headers.get("location"):
            session.call("DELETE", session.location(reply))
    except (Transient, WeightsmithError):
        return False
    return reply.status == _CREATED
