"""How many of the drafted tokens a served model accepted, by its server's own counters."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from weightsmith.evaluating.session import ServerSession

_SAMPLE = re.compile(r"(?P<name>[A-Za-z_:][A-Za-z0-9_:]*)(?:\{.*\})?\s+(?P<value>[0-9]\S*)")
"""A line of Prometheus' text format:
https://prometheus.io/docs/instrumenting/exposition_formats/#text-based-format"""
_FEW = 0.5
"""Share of accepted tokens below which a draft is said to do badly."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drafted:
    """Counters of a server since its start."""

    steps: int = 0
    """Steps in which drafted tokens were judged."""
    tokens: int = 0
    """Tokens that were drafted."""
    accepted: int = 0

    def since(self, earlier: Drafted) -> Drafted:
        """Return what was counted after `earlier`."""
        return Drafted(
            steps=self.steps - earlier.steps,
            tokens=self.tokens - earlier.tokens,
            accepted=self.accepted - earlier.accepted,
        )


def drafted(session: ServerSession, names: Sequence[str]) -> Drafted | None:
    """Return a server's counters at /metrics, of these names in the order of the fields.

    None if it has none. Raises what the session raises for a server that does not answer.
    """
    found = _samples(session, names)
    if not names or not all(found.values()):
        return None
    # One for each of the server's engines.
    steps, tokens, accepted = (int(sum(found[name])) for name in names)
    return Drafted(steps=steps, tokens=tokens, accepted=accepted)


def last_length(session: ServerSession, name: str) -> str:
    """Return what a server's gauge says of its latest steps with drafts.

    Raises what the session raises for a server that does not answer.
    """
    found = [value for value in _samples(session, [name])[name] if value > 0]
    if not found:
        return "the server measured no drafts"
    return f"{sum(found) / len(found):.2f} tokens a step in the latest steps, by its own gauge"


def _samples(session: ServerSession, names: Sequence[str]) -> dict[str, list[float]]:
    """Return all values of these metrics at /metrics, by name."""
    answer, found = session.try_get("/metrics"), {name: list[float]() for name in names}
    for line in answer.text.splitlines() if answer.status == 200 else ():
        sample = _SAMPLE.match(line)
        if sample and sample["name"] in found:
            with suppress(ValueError):  # a line that was cut off
                found[sample["name"]].append(float(sample["value"]))
    return found


def acceptance(before: Drafted | None, after: Drafted | None) -> str:
    """Return what became of the tokens drafted in between."""
    if before is None or after is None:
        return "the server counts no drafts"
    found = after.since(before)
    if found.tokens <= 0:
        return "nothing was drafted for the questions"
    share = found.accepted / found.tokens
    said = f"{found.accepted} of {found.tokens} drafted tokens were accepted ({share:.0%})"
    if found.steps > 0:
        said += f": {1 + found.accepted / found.steps:.2f} tokens a step"
    if share < _FEW:
        said += "; drafts that were not trained with a fine-tune do badly: `bench` says if they pay"
    return said
