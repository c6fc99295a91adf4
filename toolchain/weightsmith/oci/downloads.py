"""Downloads manifests and blobs from a registry and verifies them."""

from __future__ import annotations

from collections.abc import Iterator

from weightsmith.core.errors import Altered
from weightsmith.core.values import Blob, Digest
from weightsmith.oci import connections, manifests
from weightsmith.oci.layers import CHUNK, verified
from weightsmith.oci.references import Reference
from weightsmith.oci.session import TRIES, RegistryReply, RegistrySession, Transient

_ACCEPT = {"Accept": ", ".join((*manifests.MANIFESTS, *manifests.INDEXES))}
_OK, _PARTIAL, _MISSING = 200, 206, 404


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
    return verified(chunks, wanted, session.registry, altered_hint(session), Altered)


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


def _resumed(session: RegistrySession, wanted: Blob) -> Iterator[bytes]:
    at = failures = 0
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
