"""What this machine knows of registries: the user's credentials, and what we have pushed.

Credentials are in Docker's config.json and its credential helpers.
`docker.auth` (docker 7.2) does not do: a broken config.json gives no credentials instead of an
error, one malformed entry breaks the lookup for all registries, plain `username` and `password` are
ignored, a failing helper hides `auths`, and helpers have no time limit.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from weightsmith.core.errors import EnvironmentFailure, InputRefused
from weightsmith.core.files import write_whole
from weightsmith.core.privacy import private
from weightsmith.core.safe_parse import parse
from weightsmith.core.values import Digest, JsonValue, canonical
from weightsmith.outside import process

_PROGRAM = re.compile(r"[A-Za-z0-9._-]+")


def docker_config() -> Mapping[str, JsonValue]:
    """Return the user's config.json (DOCKER_CONFIG, else ~/.docker); {} if there is none.

    Raises EnvironmentFailure if it cannot be read, InputRefused if it is damaged.
    """
    try:
        folder = Path(os.environ.get("DOCKER_CONFIG") or Path.home() / ".docker")
    except RuntimeError:  # no home folder
        return {}
    try:
        data = (folder / "config.json").read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise EnvironmentFailure(
            f"cannot read {folder}/config.json: {error.strerror}",
            hint="correct its owner and permissions, or set DOCKER_CONFIG to another folder",
        ) from None
    try:
        config = parse(data) if data.strip() else {}  # Docker accepts an empty file, too
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise InputRefused(
            f"{folder}/config.json is not a JSON object", hint="repair it, or log in again"
        )
    return config


def ask_helper(name: str, server: str) -> tuple[str, str] | None:
    """Run `docker-credential-NAME get` for a server; None if it has no credentials.

    https://github.com/docker/docker-credential-helpers
    """
    if not _PROGRAM.fullmatch(name):
        raise InputRefused(
            f"the credential helper {name!r} is not a valid program name",
            hint="correct credHelpers or credsStore in Docker's config.json",
        )
    said: list[str] = []
    try:
        done = process.run(
            [f"docker-credential-{name}", "get"],
            env=process.scrubbed(os.environ),
            input=server.encode(),
            on_line=said.append,
            on_error_line=lambda _: None,  # helpers of clouds warn there
            timeout=30,
        )
        found = parse("\n".join(said)) if done.returncode == 0 else {}
    except (EnvironmentFailure, ValueError):
        return None
    if not isinstance(found, dict):
        return None
    user, secret = found.get("Username"), found.get("Secret")
    return (str(user), str(secret)) if user and secret else None


_MOST = 4000
"""Layers remembered per registry; the oldest are dropped first."""


class PushedLayers:
    """A small file in the cache; losing it only costs an upload."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._noted: dict[tuple[str, str], str] = {}

    def repository(self, registry: str, digest: Digest) -> str:
        """Return a repository that has the layer, or had it at our last push; or empty."""
        return self._noted.get((registry, digest)) or self._read(registry).get(digest, "")

    def record(self, registry: str, repository: str, digests: Iterable[Digest]) -> None:
        """Record that a repository has these layers."""
        known = self._read(registry)
        for digest in digests:
            known.pop(digest, None)
            known[digest] = repository
        rows = list(known.items())[-_MOST:]
        with suppress(OSError):
            private(self._folder, "pushed")
            write_whole(self._path(registry), canonical(rows))

    def note(self, registry: str, repository: str, digests: Iterable[Digest]) -> None:
        """Know until this process ends that a repository has these layers."""
        self._noted |= {(registry, digest): repository for digest in digests}

    def _read(self, registry: str) -> dict[str, str]:
        try:
            rows = parse(self._path(registry).read_bytes())
            return {str(digest): str(name) for digest, name in rows}
        except (OSError, ValueError, TypeError):
            return {}

    def _path(self, registry: str) -> Path:
        return self._folder / "pushed" / f"{Digest.of(registry.encode()).short}.json"
