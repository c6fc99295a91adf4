"""The journal of finished shards, with which a killed merge resumes."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weightsmith.core.errors import EnvironmentFailure, UsageError
from weightsmith.core.safe_parse import parse_file
from weightsmith.core.trees import remove
from weightsmith.merging.stream import sha256_file

_NAME = ".merge-journal.json"


@dataclass(slots=True)
class Journal:
    """The finished shards of one merge, identified by `key`."""

    path: Path
    key: str
    """Key of the merge's inputs and parameters."""

    def matches(self) -> bool:
        """Return whether the journal exists and has this key."""
        return self._read() is not None

    def finished(self, root: Path) -> dict[str, dict[str, Any]]:
        """Return the finished shards whose files are unchanged."""
        shards: Mapping[str, dict[str, Any]] = (self._read() or {}).get("shards", {})
        parts = self.parts()
        return {
            name: entry
            for name, entry in shards.items()
            if name in parts and _matches(root / name, entry)
        }

    def parts(self) -> dict[str, dict[str, Any]]:
        """Return each shard's counts (`MergeCounts.about`)."""
        return dict((self._read() or {}).get("parts", {}))

    def _read(self) -> dict[str, Any] | None:
        try:
            kept = parse_file(self.path)
        except (OSError, ValueError):
            return None
        return kept if isinstance(kept, dict) and kept.get("key") == self.key else None

    def record(
        self,
        shards: Mapping[str, Mapping[str, Any]],
        parts: Mapping[str, Mapping[str, Any]],
    ) -> None:
        """Replace the journal's shards and counts."""
        text = json.dumps({"key": self.key, "shards": shards, "parts": parts}, sort_keys=True)
        temporary = self.path.with_name(f"{self.path.name}.partial")
        temporary.write_text(text)
        temporary.replace(self.path)


def open_out(out: Path, inputs: Sequence[Path], key: str, *, own: bool) -> Journal:
    """Create the output folder, or resume an earlier run with the same key in it.

    In an `own` folder, files of another merge are deleted. Raises UsageError if the folder has
    other files or is inside an input, and EnvironmentFailure if it cannot be created.
    """
    out = out.resolve()
    for source in inputs:
        if out == source.resolve() or out.is_relative_to(source.resolve()):
            raise UsageError(
                f"{out} is inside the input {source}", hint="choose another output folder"
            )
    try:
        out.mkdir(parents=True, exist_ok=True)
        existing = [name for name in os.listdir(out) if not name.endswith(".partial")]  # noqa: PTH208
    except OSError as error:
        raise EnvironmentFailure(
            f"cannot create {out}: {error.strerror}", hint="choose another output folder"
        ) from error
    journal = Journal(path=out / _NAME, key=key)
    if existing and not journal.matches():
        if own:
            # Killed after the journal was deleted but before the folder was renamed, or started
            # from other files: useless, and nobody else would delete it.
            for name in os.listdir(out):  # noqa: PTH208 - the folder itself is mounted
                remove(out / name)
            return open_out(out, inputs, key, own=own)
        raise UsageError(
            f"{out} is not empty and cannot be resumed: it does not belong to this merge",
            hint="empty it, or choose another output folder",
        )
    for left in out.glob("*.partial"):
        left.unlink()
    if not existing:
        journal.record({}, {})
    return journal


def _matches(path: Path, entry: Mapping[str, Any]) -> bool:
    entry = entry.get("header", entry)  # of a file without data, which stands for another
    return (
        path.is_file()
        and path.stat().st_size == entry.get("size")
        and sha256_file(path) == entry.get("sha256")
    )
