"""A merge that was killed goes on: what is finished is written down beside it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weightsmith.errors import EnvironmentFailure, UsageError
from weightsmith.foreign import parse_file
from weightsmith.merging.stream import sha256_file
from weightsmith.trees import remove

_NAME = ".merge-journal.json"


@dataclass(slots=True)
class Journal:
    """Which shards of one merge are finished; it is worthless to a merge of anything else."""

    path: Path
    key: str
    """Identity of the merge's inputs and parameters."""

    def matches(self) -> bool:
        """Say whether there is a journal of this very merge."""
        return self._read() is not None

    def finished(self, root: Path) -> dict[str, dict[str, Any]]:
        """Return the finished shards that are still there, byte for byte."""
        shards: Mapping[str, dict[str, Any]] = (self._read() or {}).get("shards", {})
        parts = self.parts()
        return {
            name: entry
            for name, entry in shards.items()
            if name in parts and _matches(root / name, entry)
        }

    def parts(self) -> dict[str, dict[str, Any]]:
        """Return what was counted in each shard (`Tally.about`)."""
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
        """Replace the journal with one that names these shards, and what was counted in them."""
        text = json.dumps({"key": self.key, "shards": shards, "parts": parts}, sort_keys=True)
        temporary = self.path.with_name(f"{self.path.name}.partial")
        temporary.write_text(text)
        temporary.replace(self.path)


def open_out(out: Path, inputs: Sequence[Path], key: str, *, own: bool) -> Journal:
    """Make the output folder; an earlier run of the same merge, by its key, may go on in it.

    Of a folder of one's `own` making, what it holds of another merge is deleted. Raises UsageError
    where the folder holds something else or lies in an input, and EnvironmentFailure.
    """
    out = out.resolve()
    for source in inputs:
        if out == source.resolve() or out.is_relative_to(source.resolve()):
            raise UsageError(f"{out} lies in the input {source}", hint="give another output folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        held = [name for name in os.listdir(out) if not name.endswith(".partial")]  # noqa: PTH208
    except OSError as error:
        raise EnvironmentFailure(
            f"{out} cannot be made: {error.strerror}", hint="give another output folder"
        ) from error
    journal = Journal(path=out / _NAME, key=key)
    if held and not journal.matches():
        if own:
            # Killed after the journal's end but before the folder got its name, or begun from
            # other files: worth nothing, and nobody else could clear it.
            remove(out)
            return open_out(out, inputs, key, own=own)
        raise UsageError(
            f"{out} is not empty, and what it holds is not the start of this merge",
            hint="empty it, or give another output folder",
        )
    for left in out.glob("*.partial"):
        left.unlink()
    if not held:
        journal.record({}, {})
    return journal


def _matches(path: Path, entry: Mapping[str, Any]) -> bool:
    return (
        path.is_file()
        and path.stat().st_size == entry.get("size")
        and sha256_file(path) == entry.get("sha256")
    )
