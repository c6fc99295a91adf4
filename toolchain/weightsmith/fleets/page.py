"""How a fleet goes: page and JSON beside the folders of its builds, and lines or a table."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from weightsmith.core.escape import clock, printed, put_line, quoted
from weightsmith.core.files import write_whole
from weightsmith.core.values import JsonValue, canonical
from weightsmith.evaluating.pages import render_view
from weightsmith.fleets.rows import (
    ENDED,
    NOT_MADE,
    REFUSED,
    RUNNING,
    WAITING,
    CellRow,
    Changed,
    FleetRows,
    SharedRow,
)

PAGE, FILE = "fleet.html", "fleet.json"
_EVERY = 2.0
"""Seconds between two writings while the fleet runs."""
_ORDER = (NOT_MADE, REFUSED, "not proven", "", "passed")
"""Verdicts by how much attention they need; empty while a cell has not ended."""
ANSWERED = {"image": "image", "dequantized": "dequantized weights"}
"""Whose score a cell has, in words."""
_STATES = {WAITING: "waits", RUNNING: "runs"}


@dataclass(slots=True)
class Page:
    """Writes the page, at most every few seconds until the fleet has ended."""

    dist: Path
    title: str
    _written: float = 0.0

    def changed(self, rows: FleetRows) -> None:
        """Write page and JSON if it is time."""
        over = rows.ended == len(rows.cells)
        if not over and time.monotonic() - self._written < _EVERY:
            return
        self.write(rows)

    def write(self, rows: FleetRows, *, stopped: bool = False) -> None:
        """Write page and JSON; `stopped` if nothing runs any more. Raises OSError."""
        text = render_view(view(rows, self.title, self.dist, stopped=stopped), "fleet.html.j2")
        write_whole(self.dist / PAGE, text.encode("utf-8", errors="replace"))
        write_whole(self.dist / FILE, canonical(rows) + b"\n")
        self._written = time.monotonic()


def view(rows: FleetRows, title: str, dist: Path, *, stopped: bool = False) -> dict[str, JsonValue]:
    """Return what the page shows: cells by what needs attention, then by name."""
    counts = {name: sum(row.verdict == name for row in rows.cells) for name in _ORDER if name}
    left = len(rows.cells) - rows.ended
    return {
        "title": title,
        "over": stopped or not left,
        "verdict": _verdict(rows, counts, left, stopped=stopped),
        "cells": [_cell(row, dist, stopped=stopped) for row in _sorted(rows)],
        "shared": [{**row.to_json(), "shown": _state(row, stopped=stopped)} for row in rows.shared],
        "ended": rows.ended,
        "passed": counts["passed"] + counts["not proven"],
        "cpu_hours": rows.cpu_seconds / 3600,
        "own_share": rows.own_cpu_seconds / rows.cpu_seconds if rows.cpu_seconds else 0.0,
        "bytes_moved": rows.bytes_moved,
        "cached": rows.share_cached,
        "seconds": rows.seconds,
        "stages": rows.stages,
        "left": None if stopped else left_seconds(rows),
    }


def _sorted(rows: FleetRows) -> list[CellRow]:
    return sorted(rows.cells, key=lambda row: (_ORDER.index(row.verdict), row.adapter, row.target))


def left_seconds(rows: FleetRows) -> float | None:
    """Return the seconds left at the rate so far; None until a cell was built.

    Half of what runs counts as done: else the first of many cells at once would speak for all.
    """
    built = sum(row.state == ENDED and not row.cached and row.tries > 0 for row in rows.cells)
    half = sum(row.state == RUNNING for row in rows.cells) / 2
    todo = len(rows.cells) - rows.ended - half
    return rows.seconds / (built + half) * todo if built and todo else None


def _verdict(
    rows: FleetRows, counts: dict[str, int], left: int, *, stopped: bool
) -> dict[str, JsonValue]:
    wrong = [
        f"{row.adapter} with {row.target}: {row.error}"
        for row in rows.cells
        if row.verdict in (REFUSED, NOT_MADE)
    ]
    reasons = [*wrong[:5], *([f"and {len(wrong) - 5} more"] if len(wrong) > 5 else [])]
    if wrong:
        said = [f"{counts[name]} {name}" for name in (NOT_MADE, REFUSED) if counts[name]]
        return {"state": "failed", "headline": ", ".join(said), "reasons": reasons}
    if left:
        done = f"{rows.ended} of {len(rows.cells)} have ended"
        headline = "Stopped" if stopped else "Running"
        return {"state": "untested", "headline": headline, "reasons": [done]}
    if counts["not proven"]:
        headline = f"{counts['not proven']} of {len(rows.cells)} are not proven"
        why = "their gates could not have failed; each report says why"
        return {"state": "untested", "headline": headline, "reasons": [why]}
    return {"state": "passed", "headline": f"All {len(rows.cells)} passed", "reasons": []}


def _state(row: CellRow | SharedRow, *, stopped: bool) -> str:
    if row.state == ENDED:
        return "failed" if row.error else "cached" if row.cached else "done"
    return "stopped" if stopped else _STATES.get(row.state, row.state)


def _cell(row: CellRow, dist: Path, *, stopped: bool) -> dict[str, JsonValue]:
    mark = {"passed": "good", REFUSED: "bad", NOT_MADE: "bad"}.get(row.verdict, "faint")
    report = os.path.relpath(row.report, dist) if row.report else ""
    return {
        **row.to_json(),
        "suites": [suite.to_json() for suite in row.suites],
        "shown": row.verdict or _state(row, stopped=stopped),
        "answered": ANSWERED.get(row.answered, ""),
        "mark": mark,
        "link": Path(report).as_posix() if report and not report.startswith("..") else "",
        "short": (row.digest or "")[7:19],
    }


_COLUMNS = ("adapter", "target", "verdict", "score", "answered by", "seconds", "digest")


def table(rows: FleetRows) -> str:
    """Return the fleet as text: one line per cell, those that need attention first."""
    lines: list[Sequence[str]] = [_COLUMNS]
    for row in _sorted(rows):
        score = "" if row.score is None else f"{row.score:.3f}"
        what = row.verdict or _STATES.get(row.state, row.state)
        # The first line of an error: the others would look like rows.
        end = (row.error or "").partition("\n")[0]
        end = end or (row.digest or "")[7:19] + (" (cached)" if row.cached else "")
        who = ANSWERED.get(row.answered, "")
        lines.append((row.adapter, row.target, what, score, who, f"{row.seconds:.1f}", end))
    widths = [max(len(line[n]) for line in lines) for n in range(len(_COLUMNS) - 1)]
    return "\n".join(
        "  ".join([*(f"{text:<{w}}" for text, w in zip(line, widths, strict=False)), line[-1]])
        for line in lines
    )


_SUMMARY_EVERY = 10.0
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
        if self.summaries and time.monotonic() - self._told >= _SUMMARY_EVERY:
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
