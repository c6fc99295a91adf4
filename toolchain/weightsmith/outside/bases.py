"""Reads `images/bases.lock`: the upstream base images and their pinned digests."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from weightsmith.core.errors import UsageError
from weightsmith.core.resources import images
from weightsmith.core.values import Digest


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """An upstream image: its tag, and its digest per platform if pinned."""

    reference: str
    digests: Mapping[str, Digest | None]
    """Platform (`linux/amd64`) -> digest; None if not pinned."""

    def pinned(self, platform: str) -> str:
        """Return the reference by digest if the lock has one for the platform, else by tag."""
        digest = self.digests.get(platform)
        return f"{self.reference}@{digest}" if digest else self.reference


def read_bases(path: Path | None = None) -> dict[str, Base]:
    """Return all bases in the lock file by purpose; raises UsageError if it is damaged."""
    file = images() / "bases.lock" if path is None else path
    try:
        entries = json.loads(file.read_text("utf-8"))
        return {purpose: _base(purpose, entry) for purpose, entry in entries.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        raise UsageError(
            f"{file} cannot be read: {problem}", hint="restore it from version control"
        ) from problem


def base(purpose: str) -> Base:
    """Return the base for a purpose such as `builder-cpu`; raises UsageError if unknown."""
    bases = read_bases()
    if purpose not in bases:
        raise UsageError(
            f"no base image for {purpose!r} in images/bases.lock",
            hint=f"it has {', '.join(sorted(bases))}",
        )
    return bases[purpose]


def _base(purpose: str, entry: Mapping[str, object]) -> Base:
    digests = entry["digests"]
    if not isinstance(digests, dict):
        raise TypeError(f"the digests of {purpose} are not an object")
    return Base(
        reference=str(entry["reference"]),
        digests={str(k): Digest(v) if v else None for k, v in sorted(digests.items())},
    )
