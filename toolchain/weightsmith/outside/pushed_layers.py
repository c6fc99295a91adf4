"""Remembers which repository of a registry has which layers, for cross-repository mounts."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from weightsmith.core.files import write_whole
from weightsmith.core.privacy import private
from weightsmith.core.safe_parse import parse
from weightsmith.core.values import Digest, canonical

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
            return {str(digest): str(name) for digest, name in parse(self._text(registry))}
        except (OSError, ValueError, TypeError):
            return {}

    def _text(self, registry: str) -> bytes:
        return self._path(registry).read_bytes()

    def _path(self, registry: str) -> Path:
        return self._folder / "pushed" / f"{Digest.of(registry.encode()).short}.json"
