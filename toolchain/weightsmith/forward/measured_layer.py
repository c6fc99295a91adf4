"""How long a pass over a model takes, from the measured time of one of its layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from weightsmith.core.json_objects import JsonObject


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTime(JsonObject):
    """Seconds of one decoder layer and of the head, for two counts of tokens."""

    layers: int
    counts: tuple[int, ...]
    layer: tuple[float, ...]
    head: tuple[float, ...]

    def passed(self, tokens: float, positions: float) -> float:
        """Return the seconds of a pass over all layers, with logits at some positions."""
        return self.layers * self._at(self.layer, tokens) + self._at(self.head, positions)

    def _at(self, seconds: Sequence[float], tokens: float) -> float:
        """Return the seconds for a number of tokens, on the line through both measurements."""
        few, many = self.counts
        slope = max(0.0, (seconds[1] - seconds[0]) / (many - few))
        return max(0.0, seconds[0] - slope * few) + slope * tokens
