"""Image references: `[registry[:port]/]repository[:tag][@sha256:…]`, by Docker's rules."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, replace

from weightsmith.core.errors import UsageError
from weightsmith.core.values import Digest

DOCKER_HUB = "docker.io"

# Grammar: https://github.com/distribution/reference (reference.go).
_LABEL = r"[a-zA-Z0-9](?:[a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?"
_HOST = re.compile(rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[0-9a-fA-F:.]+\])(?::(?P<port>[0-9]{{1,5}}))?")
_PART = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_REPOSITORY = re.compile(rf"{_PART}(?:/{_PART})*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_LONGEST_TAG = 128
_LONGEST_NAME = 255
_HIGHEST_PORT = 65535


@dataclass(frozen=True, slots=True)
class Reference:
    """An image reference: always with its registry, and with a tag, a digest or both."""

    registry: str
    repository: str
    tag: str | None = None
    digest: Digest | None = None

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Parse a reference as Docker does (`docker.io`, `library/`, `latest`), or UsageError."""
        if not text.strip():
            raise UsageError(
                "the image reference is empty",
                hint="write [registry[:port]/]repository[:tag][@sha256:…]",
            )
        if "://" in text:
            raise _refused(text, "it begins with a scheme")
        if text.startswith("oci:"):
            raise UsageError(
                f"{text} is a folder, and a registry's reference is needed here",
                hint="name [registry[:port]/]repository[:tag]; to have a layout elsewhere, copy"
                " its folder",
            )
        rest, at, digest_text = text.partition("@")
        try:
            digest = Digest(digest_text) if at else None
        except ValueError:
            why = "'@' must be followed by sha256: and 64 hexadecimal digits"
            raise _refused(text, why) from None
        first, slash, repository = rest.partition("/")
        named = "." in first or ":" in first or first == "localhost" or first != first.lower()
        registry = DOCKER_HUB if first == "index.docker.io" else first
        if not (slash and named):
            registry, repository = DOCKER_HUB, rest
        repository, colon, tag = repository.partition(":")
        if registry == DOCKER_HUB and "/" not in repository:
            repository = f"library/{repository}"
        if len(tag) > _LONGEST_TAG:
            raise _refused(text, f"the tag is longer than {_LONGEST_TAG} characters")
        if colon and not _TAG.fullmatch(tag):
            raise _refused(text, f"the tag {tag!r} may hold only letters, digits, '_', '.', '-'")
        _check_name(text, registry, repository)
        chosen = tag or (None if digest else "latest")
        return cls(registry, repository, chosen, digest)

    def __str__(self) -> str:
        """Return the full form; parsing it gives the same reference."""
        tag = f":{self.tag}" if self.tag else ""
        return f"{self.name}{tag}{f'@{self.digest}' if self.digest else ''}"

    @property
    def name(self) -> str:
        """Registry and repository, without tag and digest."""
        return f"{self.registry}/{self.repository}"

    @property
    def is_loopback(self) -> bool:
        """True if the registry is on this machine, so that plain HTTP does not leave it."""
        return is_loopback(re.sub(r":[0-9]+$", "", self.registry))

    def at(self, digest: Digest) -> Reference:
        """Return the reference of that digest in the same repository, without a tag."""
        return replace(self, tag=None, digest=digest)


def is_loopback(host: str) -> bool:
    """Say whether a host (without a port) is this machine."""
    name = host.strip("[]").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _check_name(text: str, registry: str, repository: str) -> None:
    host = _HOST.fullmatch(registry)
    if registry.startswith("["):
        try:
            ipaddress.IPv6Address(registry[1:].partition("]")[0])
        except ValueError:
            host = None
    if not host or int(host["port"] or 1) not in range(1, _HIGHEST_PORT + 1):
        raise _refused(text, f"{registry!r} is not a valid registry host")
    if not _REPOSITORY.fullmatch(repository):
        raise _refused(
            text,
            f"the repository {repository!r} must be lower case: letters and digits, "
            "joined by '.', '_', '-' or '/'",
        )
    if len(registry) + 1 + len(repository) > _LONGEST_NAME:
        raise _refused(text, f"its name is longer than {_LONGEST_NAME} characters")


def _refused(text: str, why: str) -> UsageError:
    login, at, rest = text.rpartition("@")
    if at and ":" in login and not rest.startswith("sha256"):
        return UsageError(
            f"…@{rest[:300]} is not an image reference: it contains a user name and a password",
            hint="write [registry[:port]/]repository[:tag][@sha256:…], and run `docker login`",
        )
    return UsageError(
        f"{text[:300]!r} is not an image reference: {why}",
        hint="write [registry[:port]/]repository[:tag][@sha256:…]",
    )
