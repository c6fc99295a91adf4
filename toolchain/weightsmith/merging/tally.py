"""Counts about the tensors of a merge, kept in the journal for a merge that resumes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from weightsmith.core.values import Json, JsonValue
from weightsmith.merging.repair import Repairs


@dataclass(slots=True)
class MergeCounts:
    """Counts and tensor names that become findings."""

    repairs: Repairs = field(default_factory=Repairs)
    silent: dict[int, list[str]] = field(default_factory=dict)
    """Adapter index -> tensors for which a factor is all zero."""
    unchanged: tuple[str, ...] = ()
    """Changed tensors whose result equals the base's bits."""
    largest: dict[str, float] = field(default_factory=dict)
    """Computed matrices -> their largest magnitude, if no weights are written."""

    def about(self, names: Iterable[str], repairs: Repairs) -> dict[str, JsonValue]:
        """Return the counts of these tensors as JSON; `repairs` are theirs."""
        own = set(names)
        # Copied because the next shard is being computed concurrently.
        silent = list(self.silent.items())
        return {
            "silent": {
                str(number): [name for name in some if name in own] for number, some in silent
            },
            "unchanged": [name for name in self.unchanged if name in own],
            "repairs": [repairs.float64, repairs.exact],
            "largest": {name: most for name, most in self.largest.items() if name in own},
        }

    def add(self, part: Mapping[str, Json]) -> None:
        """Add counts returned by `about`."""
        for number, names in part["silent"].items():
            if names:
                self.silent.setdefault(int(number), []).extend(names)
        self.unchanged += tuple(part["unchanged"])
        self.largest |= part["largest"]
        self.repairs.float64 += part["repairs"][0]
        self.repairs.exact += part["repairs"][1]
