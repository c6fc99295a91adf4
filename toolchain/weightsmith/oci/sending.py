"""Sends one blob into an upload session, whole or in chunks, and resumes broken connections.

https://github.com/opencontainers/distribution-spec/blob/main/spec.md#push

A layer whose digest was not just computed is hashed while it is sent, and its last chunk goes only
if the digest is right: Pulp accepts a blob under any digest, and takes what arrived of an
interrupted PUT for complete. So a large layer is sent with PATCH and then finished, as Docker does.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from urllib.parse import quote

from weightsmith.core.errors import Altered, WeightsmithError
from weightsmith.core.values import Blob, Digest
from weightsmith.oci.downloads import altered_hint, declared_digest
from weightsmith.oci.image import Opener
from weightsmith.oci.limits import limits_of
from weightsmith.oci.replies import RegistryReply, Transient
from weightsmith.oci.session import RegistrySession

_OK, _CREATED, _ACCEPTED, _NO_CONTENT = 200, 201, 202, 204
_SUCCEEDED = (_ACCEPTED, _NO_CONTENT, _CREATED)
"""Replies to a chunk: the specification's, and those of registries that differ."""
_BAD, _MISSING, _TOO_LARGE, _OUT_OF_STEP = 400, 404, 413, 416
_NO_PARTS = (_MISSING, 405, 501)
"""Replies of registries that accept a blob only in one request."""
_CHUNK = 32 << 20
_LARGEST_CHUNK = 256 << 20
_SMALL = 1 << 20
"""Bytes; up to this size a blob is sent in one PUT. A larger one is sent by PATCH and finished by
PUT, as Docker does: Pulp stores what arrived of a broken PUT as if it were the whole blob."""
_BINARY = "application/octet-stream"
_FEW = 3
"""Tries when asking how much was kept."""
_FINISH = 1800
"""Seconds that a registry may take after the last byte; some copy a layer to another store."""


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
        again = session.call("POST", "blobs/uploads/", headers={"Content-Length": "0"})
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
            headers = {"Content-Length": str(blob.size), "Content-Type": _BINARY}
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
    """Send everything after the first `at` bytes."""
    if at == blob.size:
        return _finish(session, upload, blob)
    reply = _patch(session, upload, at, blob.size - at, lambda: _after(body(), at), whole=not at)
    return _finish(session, reply, blob) if reply.status in _SUCCEEDED else reply


def _in_chunks(
    session: RegistrySession, body: Opener, upload: RegistryReply, blob: Blob, size: int, at: int
) -> RegistryReply:
    """Send what follows `at` bytes in chunks, for registries that refuse large bodies.

    A chunk is held in memory, since it may have to be sent again with another token.
    """
    reply = upload
    for piece in _pieces(_after(body(), at), min(size, _LARGEST_CHUNK)):
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
    headers = {"Content-Length": str(length), "Content-Type": _BINARY}
    if not whole:
        # Registries without chunked uploads accept a whole blob if there is no Content-Range.
        headers["Content-Range"] = f"{at}-{at + length - 1}"
    return session.call("PATCH", session.location(upload), headers=headers, body=body, wait=_FINISH)


def _finish(session: RegistrySession, upload: RegistryReply, blob: Blob) -> RegistryReply:
    url = _finishing(session.location(upload), blob)
    return session.call("PUT", url, headers={"Content-Length": "0"}, wait=_FINISH)


def _after(chunks: Iterator[bytes], at: int) -> Iterator[bytes]:
    """Skip the first `at` bytes."""
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
