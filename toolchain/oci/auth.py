"""How a registry wants to be asked: Basic and Bearer challenges, and where secrets come from.

https://distribution.github.io/distribution/spec/auth/token/ and RFC 9110 section 11
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from toolchain.errors import InputRefused
from toolchain.oci.references import DOCKER_HUB
from toolchain.values import Json

Credentials: TypeAlias = Callable[[str], tuple[str, str] | None]
"""Registry host (`docker.io` for Docker Hub) -> user and secret, or None for anonymous."""
Helper: TypeAlias = Callable[[str, str], tuple[str, str] | None]
"""Runs `docker-credential-<first> get` for the server `second`; starting it is a driver's work."""

IDENTITY = "<token>"
"""The user name under which helpers hand out an identity token instead of a password."""

_HUB_KEY = "https://index.docker.io/v1/"
_PAIR = re.compile(r'([a-zA-Z_]+)="([^"]*)"')


def anonymous(_host: str) -> None:
    """Give no credentials to anyone."""


@dataclass(frozen=True, slots=True)
class Challenge:
    """What a 401 asks for: `basic`, or `bearer` with where to get a token."""

    kind: str
    realm: str = ""
    service: str = ""


def parse_challenge(headers: list[str]) -> Challenge | None:
    """Read WWW-Authenticate headers; Bearer before Basic, None for what we do not speak."""
    text = ", ".join(headers)
    bearer = re.search(r"(?i)\bbearer\s+(.*)", text)
    if bearer:
        pairs = dict(_PAIR.findall(bearer[1]))
        if pairs.get("realm"):
            return Challenge("bearer", pairs["realm"], pairs.get("service", ""))
    return Challenge("basic") if re.search(r"(?i)\bbasic\b", text) else None


def basic(pair: tuple[str, str]) -> str:
    """Return the Authorization header of a user and a password."""
    return "Basic " + base64.b64encode(":".join(pair).encode()).decode()


def docker_config(config: Mapping[str, Json], helper: Helper | None = None) -> Credentials:
    """Return the credentials that a `~/.docker/config.json` knows, by Docker's own order.

    A host's helper (`credHelpers`), then the store (`credsStore`), then `auths`.
    https://docs.docker.com/reference/cli/docker/login/
    """

    def find(host: str) -> tuple[str, str] | None:
        keys = [_HUB_KEY, "index.docker.io", host] if host == DOCKER_HUB else [host]
        keys += [f"https://{host}", f"https://{host}/v1/", f"https://{host}/v2/"]
        helpers = config.get("credHelpers") or {}
        program = next((helpers[key] for key in keys if key in helpers), config.get("credsStore"))
        if program and helper and (found := helper(str(program), keys[0])):
            return found
        auths = config.get("auths") or {}
        return next((_stored(auths[key], host) for key in keys if auths.get(key)), None)

    return find


def _stored(entry: Mapping[str, Json], host: str) -> tuple[str, str] | None:
    if entry.get("identitytoken"):
        return IDENTITY, str(entry["identitytoken"])
    if entry.get("username"):
        return str(entry["username"]), str(entry.get("password", ""))
    try:
        user, colon, secret = (
            base64.b64decode(entry.get("auth") or "", validate=True).decode().partition(":")
        )
    except (ValueError, TypeError):
        raise InputRefused(
            f"the entry for {host} in Docker's config.json is damaged",
            hint=f"run `docker login {host}` again",
        ) from None
    return (user, secret) if colon else None
