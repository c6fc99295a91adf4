"""Registry authentication: Basic and Bearer challenges, and credentials from Docker's config.

https://distribution.github.io/distribution/spec/auth/token/ and RFC 9110 section 11
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from weightsmith.core.errors import InputRefused
from weightsmith.core.values import JsonValue
from weightsmith.oci.references import DOCKER_HUB

Credentials: TypeAlias = Callable[[str], tuple[str, str] | None]
"""Registry host (`docker.io` for Docker Hub) -> user and secret, or None for anonymous."""
Helper: TypeAlias = Callable[[str, str], tuple[str, str] | None]
"""Runs `docker-credential-<first> get` for the server `second`; implemented by a driver."""

IDENTITY = "<token>"
"""User name with which helpers return an identity token instead of a password."""

_HUB_KEY = "https://index.docker.io/v1/"
# Possessive quantifiers: backtracking would take seconds for a header of 16 kB.
_PAIR = re.compile(r'(?<![a-zA-Z_])([a-zA-Z_]++)\s*+=\s*+(?:"([^"]*+)"|([^\s",]++))')
_LONGEST_CHALLENGE = 8 << 10
"""Characters of all WWW-Authenticate headers together; registries send a few hundred."""


def anonymous(_host: str) -> None:
    """Return no credentials: anonymous access."""


@dataclass(frozen=True, slots=True)
class Challenge:
    """What a 401 reply asks for: `basic`, or `bearer` with the token service's URL."""

    kind: str
    realm: str = ""
    service: str = ""


def parse_challenge(headers: list[str]) -> Challenge | None:
    """Parse WWW-Authenticate headers; Bearer before Basic, None for unsupported schemes."""
    text = ", ".join(headers)[:_LONGEST_CHALLENGE]
    bearer = re.search(r"(?i)\bbearer\s++(.*)", text)
    if bearer:
        pairs = {key.lower(): quoted or bare for key, quoted, bare in _PAIR.findall(bearer[1])}
        if pairs.get("realm"):
            return Challenge("bearer", pairs["realm"], pairs.get("service", ""))
    return Challenge("basic") if re.search(r"(?i)\bbasic\b", text) else None


def basic(pair: tuple[str, str]) -> str:
    """Return the Authorization header of a user and a password."""
    return "Basic " + base64.b64encode(":".join(pair).encode()).decode()


def credentials_in(config: Mapping[str, JsonValue], helper: Helper | None = None) -> Credentials:
    """Return a lookup in a parsed `~/.docker/config.json`, in Docker's own order.

    A host's helper (`credHelpers`), then the store (`credsStore`), then `auths`.
    https://docs.docker.com/reference/cli/docker/login/
    """

    def find(host: str) -> tuple[str, str] | None:
        keys = [_HUB_KEY, "index.docker.io", host] if host == DOCKER_HUB else [host]
        helpers = _matching(config.get("credHelpers"), keys)
        program = next(helpers, config.get("credsStore"))
        if program and helper and (found := helper(str(program), keys[0])):
            return found
        entry = next((one for one in _matching(config.get("auths"), keys) if one), None)
        return _stored(entry, host) if entry else None

    return find


def _matching(table: JsonValue, keys: Sequence[str]) -> Iterator[JsonValue]:
    """Yield a table's values for these keys, then for URLs with these hosts, as Docker does."""
    rows = table if isinstance(table, dict) else {}
    yield from (rows[key] for key in keys if key in rows)
    for name, value in rows.items():
        if name not in keys and re.sub(r"^https?://", "", name).partition("/")[0] in keys:
            yield value


def _stored(entry: JsonValue, host: str) -> tuple[str, str] | None:
    if not isinstance(entry, dict):
        raise _damaged(host)
    if entry.get("identitytoken"):
        return IDENTITY, str(entry["identitytoken"])
    if entry.get("username") and not entry.get("auth"):  # beside it, Docker ignores them
        return str(entry["username"]), str(entry.get("password", ""))
    try:
        user, colon, secret = (
            base64.b64decode("".join((entry.get("auth") or "").split()), validate=True)
            .decode()
            .partition(":")
        )
    except (ValueError, TypeError, AttributeError):
        raise _damaged(host) from None
    return (user, secret) if colon else None


def _damaged(host: str) -> InputRefused:
    return InputRefused(
        f"the entry for {host} in Docker's config.json is damaged",
        hint=f"run `docker login {host}` again",
    )
