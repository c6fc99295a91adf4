"""The writing half of the distribution protocol: blobs skipped, mounted or streamed."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import suppress
from enum import Enum
from typing import TypeAlias
from urllib.parse import quote

from toolchain.errors import InputRefused, WeightsmithError
from toolchain.oci.downloads import promised
from toolchain.oci.image import Image, Opener, blob_of
from toolchain.oci.layers import BlobLayer, Layer
from toolchain.oci.limits import limits_of
from toolchain.oci.progress import Advance, Meter
from toolchain.oci.references import Reference
from toolchain.oci.session import Reply, Session, Transient
from toolchain.values import Blob, Digest

_OK, _CREATED, _ACCEPTED, _NO_CONTENT = 200, 201, 202, 204
_BAD, _MISSING, _TOO_LARGE, _OUT_OF_STEP = 400, 404, 413, 416
_CHUNK = 32 << 20
_LARGEST_CHUNK = 256 << 20
_BINARY = "application/octet-stream"
_FEW = 3
"""Tries of a first look: long enough for a hiccup, short enough to wait for."""
_FINISH = 1800
"""Seconds that a registry may take after the last byte: some copy a layer to another store."""


Elsewhere: TypeAlias = Callable[[Blob], tuple[Session, str] | None]
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
    session: Session,
    image: Image,
    sources: Sequence[str],
    progress: Advance | None,
    parallel: int,
    elsewhere: Elsewhere | None = None,
) -> list[tuple[Way, int]]:
    """Bring every layer and the configuration there; return how, and the bytes of each.

    A layer that has to be hashed first is hashed in its own thread, beside other uploads.
    """
    stop = threading.Event()
    meter = Meter(sum(layer.size for layer in image.layers), progress)

    def work(layer: Layer) -> tuple[Way, int]:
        if stop.is_set():
            raise _Stopped
        blob = blob_of(layer)
        way = bring(session, blob, layer.open, sources, meter, stop, elsewhere)
        return way, blob.size

    with ThreadPoolExecutor(max(1, parallel)) as pool:
        futures = [pool.submit(work, layer) for layer in image.layers]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        except BaseException:
            # The pool waits for its threads, so they have to be told.
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    config = image.config_blob
    way = bring(session, config, lambda: iter((image.config_bytes,)))
    return [*(future.result() for future in futures), (way, config.size)]


def bring(
    session: Session,
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
        url = f"blobs/{blob.digest}"
        found = session.call("HEAD", url)
        if found.status == _OK:
            return Way.THERE
        if found.status != _MISSING:
            raise session.refusal(what, found)
        if elsewhere and (place := elsewhere(blob)) and _mounted(*place, blob):
            return Way.MOUNTED
        opened = _mount(session, blob, sources)
        if opened is None:
            return Way.MOUNTED
        _send(session, blob, body, opened, what)
        return Way.SENT

    way = session.attempt(what, once)
    meter.reach(blob.digest, blob.size)
    return way


def try_upload(session: Session, where: str) -> None:
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


def put_manifest(session: Session, name: str, manifest: bytes, media_type: str) -> Reply:
    """Put a manifest under a digest or a tag; InputRefused if another digest comes back."""
    what = f"cannot put the manifest {name}"
    headers = {"Content-Type": media_type}
    reply = session.attempt(
        what, lambda: session.call("PUT", f"manifests/{name}", headers=headers, body=manifest)
    )
    _check_created(session, reply, Digest.of(manifest), what)
    return reply


def _mount(session: Session, blob: Blob, sources: Sequence[str]) -> Reply | None:
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


def _mounted(session: Session, source: str, blob: Blob) -> bool:
    """Say whether a blob was mounted from where it was once pushed; it may be gone, or private."""
    url = f"blobs/uploads/?mount={blob.digest}&from={quote(source, safe='')}"
    try:
        reply = session.call("POST", url, headers={"Content-Length": "0"})
        if reply.status == _ACCEPTED and reply.headers.get("location"):
            session.call("DELETE", session.location(reply))
    except (Transient, WeightsmithError):
        return False
    return reply.status == _CREATED


def _send(session: Session, blob: Blob, body: Opener, opened: Reply, what: str) -> None:
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
        again = session.call("POST", "blobs/uploads/", headers={"Content-Length": "0"})
        if again.status != _ACCEPTED:
            raise session.refusal(what, again)
        reply, resumed = _persistently(session, blob, body, again, _CHUNK, what)
    if reply.status in (_MISSING, _OUT_OF_STEP):
        # The registry lost the upload, as it does when it starts anew.
        raise Transient(session.explain(reply))
    if reply.status == _BAD and b"DIGEST_INVALID" in reply.body:
        if resumed:
            raise Transient("the registry did not keep what it said it had")
        raise InputRefused(
            f"{what}: {session.explain(reply)}: the bytes are not what their digest says",
            hint="a file changed since it was hashed; build again",
        )
    _check_created(session, reply, blob.digest, what)


def _persistently(
    session: Session, blob: Blob, body: Opener, opened: Reply, size: int, what: str
) -> tuple[Reply, bool]:
    """Send a blob, in pieces of `size` bytes (0: whole), and go on where a connection broke.

    Return the last reply, and whether it went on anywhere. Raises Transient where the registry
    kept nothing of it.
    """
    at, place = 0, opened
    while True:
        try:
            if size:
                return _in_chunks(session, body, place, blob, size, at), at > 0
            if at:
                return _rest(session, body, place, blob, at), True
            headers = {"Content-Length": str(blob.size), "Content-Type": _BINARY}
            url = _finishing(session.location(place), blob)
            return session.call("PUT", url, headers=headers, body=body, wait=_FINISH), False
        except Transient as trouble:
            kept = _kept(session, place)
            if kept is None or not at < kept[0] <= blob.size:
                raise
            # It went on since the last time, so it will come to an end: this is the first try.
            session.wait_after(what, trouble, 1)
            at, place = kept


def _kept(session: Session, opened: Reply) -> tuple[int, Reply] | None:
    """Return how many bytes of an upload a registry has, and where it goes on; None for nothing.

    https://github.com/opencontainers/distribution-spec/blob/main/spec.md#resuming-an-upload
    """
    try:
        url = session.location(opened)
        reply = session.attempt("", lambda: session.call("GET", url), tries=_FEW)
    except (WeightsmithError, Transient):
        return None
    found = re.fullmatch(r"(?:bytes=)?0-(\d+)", reply.headers.get("range", ""))
    if reply.status not in (_OK, _NO_CONTENT) or found is None or int(found[1]) == 0:
        return None
    return int(found[1]) + 1, reply if reply.headers.get("location") else opened


def _rest(session: Session, body: Opener, place: Reply, blob: Blob, at: int) -> Reply:
    """Send all that comes after `at` bytes."""
    if at == blob.size:
        return _finish(session, place, blob)
    reply = _patch(session, place, at, blob.size - at, lambda: _after(body(), at))
    return _finish(session, reply, blob) if reply.status == _ACCEPTED else reply


def _in_chunks(
    session: Session, body: Opener, place: Reply, blob: Blob, size: int, at: int
) -> Reply:
    """Send what comes after `at` bytes in pieces, as registries ask that take no large body.

    A piece is held in memory, since it may have to be sent again with another token.
    """
    reply = place
    for piece in _pieces(_after(body(), at), min(size, _LARGEST_CHUNK)):
        length = sum(map(len, piece))
        reply = _patch(session, reply, at, length, lambda piece=piece: iter(piece))  # type: ignore[misc]
        if reply.status != _ACCEPTED:
            return reply
        at += length
    return _finish(session, reply, blob)


def _patch(session: Session, place: Reply, at: int, length: int, body: Opener) -> Reply:
    headers = {
        "Content-Length": str(length),
        "Content-Range": f"{at}-{at + length - 1}",
        "Content-Type": _BINARY,
    }
    return session.call("PATCH", session.location(place), headers=headers, body=body, wait=_FINISH)


def _finish(session: Session, place: Reply, blob: Blob) -> Reply:
    url = _finishing(session.location(place), blob)
    return session.call("PUT", url, headers={"Content-Length": "0"}, wait=_FINISH)


def _after(chunks: Iterator[bytes], at: int) -> Iterator[bytes]:
    """Leave out the first `at` bytes."""
    for chunk in chunks:
        rest = chunk[at:]
        at -= len(chunk) - len(rest)
        if rest:
            yield rest


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
    # Joined as text: the registry's own query is signed in places and must stay as it is.
    return f"{location}{'&' if '?' in location else '?'}digest={quote(blob.digest, safe='')}"


def _check_created(session: Session, reply: Reply, digest: Digest, what: str) -> None:
    if reply.status not in (_OK, _CREATED, _ACCEPTED):
        raise session.refusal(what, reply)
    there = promised(reply, session.registry)
    if there and there != digest:
        raise InputRefused(
            f"{what}: {session.registry} stored {there.short} instead",
            hint="a proxy or the registry changes what it is given; see its settings",
        )
