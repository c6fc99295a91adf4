"""How a fleet goes, on standard error: a line for each cell that ends, or a table."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TextIO

from weightsmith.core.escape import clock, printed, put_line, quoted
from weightsmith.fleets.page import ANSWERED, left_seconds, table
from weightsmith.fleets.rows import ENDED, RUNNING, CellRow, FleetRows
from weightsmith.fleets.running import Changed

_EVERY = 10.0
"""Seconds between two plain summaries."""


@contextmanager
def watcher(*, live: bool, silent: bool = False) -> Iterator[Changed]:
    """Yield what is told of every change; `live` keeps a table up where there is a terminal."""
    if silent:
        yield lambda _: None
    elif live and sys.stderr.isatty():
        with _live() as changed:
            yield changed
    else:
        yield _Lines(sys.stderr, summaries=live).changed


@dataclass(slots=True)
class _Lines:
    """One line for each task that ends, and with `summaries` how far it is every few seconds."""

    stream: TextIO
    summaries: bool
    _seen: set[str] = field(default_factory=set)
    _told: float = field(default_factory=time.monotonic)

    def changed(self, rows: FleetRows) -> None:
        for shared in rows.shared:
            if shared.state == ENDED and f"shared {shared.task}" not in self._seen:
                self._seen.add(f"shared {shared.task}")
                took = "cached" if shared.cached else f"done ({shared.seconds:.1f} s)"
                end = f"failed: {shared.error}" if shared.error else took
                self._put(f"  {shared.task}: {end}")
        for row in rows.cells:
            name = f"{row.adapter} x {row.target}"
            if row.state == ENDED and name not in self._seen:
                self._seen.add(name)
                names = (f"{one.adapter} x {one.target}" for one in rows.cells)
                count = sum(one in self._seen for one in names)
                self._put(f"[{count}/{len(rows.cells)}] {name}: {_of_cell(row)}")
        if self.summaries and time.monotonic() - self._told >= _EVERY:
            self._told = time.monotonic()
            self._put("  " + summary(rows))

    def _put(self, text: str) -> None:
        put_line(quoted(text), self.stream)


def _of_cell(row: CellRow) -> str:
    if row.error:
        return f"{row.verdict}: {row.error}"
    whose = f" ({ANSWERED[row.answered]})" if row.answered == "dequantized" else ""
    score = "" if row.score is None else f", score {row.score:.3f}{whose}"
    took = "cached" if row.cached else f"{row.seconds:.1f} s"
    return f"{row.verdict}{score}, {took}" + (f" on {row.node}" if row.node else "")


def summary(rows: FleetRows) -> str:
    """Return in one line how many cells have ended and run, the rate, and the time left."""
    states = [row.state for row in rows.cells] + [row.state for row in rows.shared]
    running = states.count(RUNNING)
    text = f"{rows.ended} of {len(rows.cells)} cells, {running} tasks run"
    if rows.ended and rows.seconds:
        text += f", {60 * rows.ended / rows.seconds:.1f} cells a minute"
    if (left := left_seconds(rows)) is not None:
        text += f", about {clock(left)} left"
    return text


@contextmanager
def _live() -> Iterator[Changed]:
    # Imported here: only a terminal needs it.
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console(stderr=True, highlight=False)
    with Live(console=console, transient=True, refresh_per_second=2) as live:

        def changed(rows: FleetRows) -> None:
            text = f"{summary(rows)}\n{table(rows)}"
            live.update(Text("\n".join(printed(quoted(line)) for line in text.splitlines())))

        yield changed
