"""What a registry says that it holds: its repositories, and a repository's tags; page by page.

https://github.com/opencontainers/distribution-spec/blob/main/spec.md#listing-tags and
https://distribution.github.io/distribution/spec/api/#catalog, which hosted registries leave out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from weightsmith.core.errors import EnvironmentFailure, InputRefused
from weightsmith.core.safe_parse import INDEX
from weightsmith.core.values import Digest, Json
from weightsmith.oci import manifests
from weightsmith.oci.references import Reference
from weightsmith.oci.registry import Registry
from weightsmith.oci.session import RegistryReply, RegistrySession

_OK, _MISSING = 200, 404
_PAGE = 1000
"""Names asked for at once; docker-registry refuses more."""
_MOST = 1_000_000
"""Names in all; a registry that never ends its list is refused."""
_NAMES = {
    "repositories": re.compile(r"[a-z0-9]+(?:(?:[._-]+|/)[a-z0-9]+)*"),
    "tags": re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}"),
}
"""What may be a name. No registry can hold another, and it would be a part of an address."""
_ATTACHED = re.compile(r"sha256-([0-9a-f]{64})(\.[a-z]+)?")
"""Tags of what is attached to an image: by the specification's fallback, and by cosign."""


def repositories(registry: Registry, host: str, prefix: str) -> list[str] | None:
    """Return the repositories named `prefix` or below it; None where there is no catalog.

    An empty prefix is the whole registry. Raises EnvironmentFailure if it cannot be reached.
    """
    session = registry.session(Reference(host, ""), "*")
    names = _listed(session, f"{session.root}/v2/_catalog?n={_PAGE}", "repositories", host)
    if names is None:
        return None
    return sorted({name for name in names if _is_below(name, prefix)})


def tags(registry: Registry, reference: Reference) -> list[str] | None:
    """Return a repository's tags; None if there is no such repository.

    Raises EnvironmentFailure if the registry refuses or cannot be reached.
    """
    session = registry.session(reference, "pull")
    found = _listed(session, f"tags/list?n={_PAGE}", "tags", reference.name, refusals=True)
    return None if found is None else sorted(set(found))


def subject_of(tag: str) -> Digest | None:
    """Return the image that a tag is about, if it is the name of what is attached to one."""
    found = _ATTACHED.fullmatch(tag)
    return Digest(f"sha256:{found[1]}") if found else None


def _is_below(name: str, prefix: str) -> bool:
    return not prefix or name == prefix or name.startswith(f"{prefix}/")


def _listed(
    session: RegistrySession, url: str, key: str, where: str, *, refusals: bool = False
) -> list[str] | None:
    """Return every page of a list; None if there is none. `refusals` raises what is refused."""
    found, seen = list[str](), set[str]()
    while url:
        if url in seen or len(found) > _MOST:
            raise EnvironmentFailure(
                f"{where}: the list of {key} does not end", hint="ask the registry's administrator"
            )
        seen.add(url)
        reply = session.attempt(
            f"cannot list the {key} of {where}",
            lambda url=url: session.call("GET", url, limit=INDEX),  # type: ignore[misc]
        )
        if reply.status != _OK:
            if found or (refusals and reply.status != _MISSING):
                raise session.refusal(f"cannot list the {key} of {where}", reply)
            return None
        found += _names(reply, key, where)
        url = session.next_page(reply)
    return found


def _names(reply: RegistryReply, key: str, where: str) -> Iterator[str]:
    try:
        document: Mapping[str, Json] = manifests.read_json(reply.body, where, INDEX)
    except InputRefused:
        raise EnvironmentFailure(
            f"{where}: the list of {key} is no JSON",
            hint="check that it is a registry's address, and not a proxy's web page",
        ) from None
    rows = document.get(key) or ()  # without tags, some registries say null
    named = (row for row in rows if isinstance(row, str)) if isinstance(rows, list) else ()
    yield from filter(_NAMES[key].fullmatch, named)
