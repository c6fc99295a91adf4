"""Progress on stderr: a live bar on a terminal or in a notebook, otherwise plain lines."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from weightsmith.core.escape import clock, escaped, printed, put_line, quoted
from weightsmith.core.ports import Progress, Silent

_PLAIN_EVERY_S = 10.0
"""Seconds between two plain lines of one stage, so that a CI log stays readable."""
_AT_ONCE_S = 0.2
"""Seconds after a stage's start in which what is reported was done before it: by an interrupted
run, or ahead of the stage's turn. It does not count for the rate."""
_ENOUGH = 20
"""One part in twenty of a stage has to be done before its rate says how long the rest takes …"""
_LONG_S = 120.0
"""… or it has gone on for so many seconds."""


def progress_for() -> Progress:
    """Return the right kind of progress for stderr."""
    live = sys.stderr.isatty()
    if not live and "IPython" in sys.modules:  # rich is slow to import
        from rich.console import Console

        live = Console().is_jupyter
    return LiveProgress() if live else PlainProgress(sys.stderr)


@contextmanager
def shown(wanted: bool) -> Iterator[Progress]:
    """Yield progress, shown if `wanted`; an error leaves no bar behind."""
    inner = progress_for() if wanted else Silent()
    try:
        yield inner
    finally:
        if isinstance(inner, LiveProgress):
            inner.stop()


class PlainProgress:
    """One line when a stage starts and ends, and every few seconds in between."""

    def __init__(self, stream: TextIO) -> None:
        self.warnings: list[str] = []
        self._stream = stream
        self._printed = time.monotonic()
        self._pace = StageProgress()

    def stage(self, name: str, detail: str) -> None:
        """Print the stage's name and detail."""
        self._printed = time.monotonic()
        self._pace = StageProgress()
        self._print(quoted(f"{name}: {detail}" if detail else name))

    def advance(self, done: int, total: int, unit: str) -> None:
        """Print done, total, rate and time left, at most every ten seconds."""
        now, shown = time.monotonic(), self._pace.describe(done, total, unit)
        if now - self._printed >= _PLAIN_EVERY_S:
            self._printed = now
            self._print(quoted("  " + shown))

    def finish(self, name: str, seconds: float, cached: bool) -> None:
        """Print how long the stage took."""
        self._print(f"{name}: {'cached' if cached else 'done'} ({seconds:.1f} s)")

    def note(self, text: str) -> None:
        """Print a line."""
        self._print(quoted("  " + text))

    def warn(self, text: str) -> None:
        """Print a warning, once."""
        if text not in self.warnings:
            self.warnings.append(text)
            self._print(quoted("  warning: " + text))

    def _print(self, text: str) -> None:
        put_line(text, self._stream)


class LiveProgress:
    """A bar with rate and time left, by rich."""

    def __init__(self) -> None:
        # Imported here: only a terminal needs it, and `invoke --list` must answer at once.
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            Progress,
            TaskID,
            TextColumn,
            TimeElapsedColumn,
        )
        from rich.text import Text

        self.warnings: list[str] = []
        self._text = Text
        self._console = Console(stderr=True, highlight=False)
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[detail]}", markup=False),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
        )
        self._task: TaskID | None = None
        self._pace = StageProgress()

    def stage(self, name: str, detail: str) -> None:
        """Start the stage's bar."""
        self.stop()
        self._print((name, "bold"), (f"  {detail}" if detail else "", ""))
        self._pace = StageProgress()
        self._task = self._bars.add_task(escaped(name), total=None, detail="")
        self._bars.start()

    def advance(self, done: int, total: int, unit: str) -> None:
        """Move the bar."""
        if self._task is not None:
            detail = escaped(self._pace.describe(done, total, unit))
            self._bars.update(self._task, completed=done, total=total or None, detail=detail)

    def finish(self, name: str, seconds: float, cached: bool) -> None:
        """Replace the bar by one line."""
        self.stop()
        mark = ("cached", "dim") if cached else ("done", "green")
        self._print((name, "bold"), ("  ", ""), mark, (f" ({seconds:.1f} s)", ""))

    def note(self, text: str) -> None:
        """Print a line above the bar."""
        self._print((f"  {text}", ""))

    def warn(self, text: str) -> None:
        """Print a warning above the bar, once."""
        if text not in self.warnings:
            self.warnings.append(text)
            self._print((f"  warning: {text}", "yellow"))

    def _print(self, *parts: tuple[str, str]) -> None:
        # Text, never markup: `[bold]` or `:skull:` in a name must not be interpreted. The terminal
        # wraps long lines, so that no new line starts with part of a name.
        text = self._text.assemble(*((printed(quoted(part)), style) for part, style in parts))
        self._console.print(text, soft_wrap=True)

    def stop(self) -> None:
        """Take the bar away, if there is one."""
        if self._task is not None:
            self._bars.stop()
            self._bars.remove_task(self._task)
            self._task = None


class StageProgress:
    """How far a stage is, how fast it goes, and how long the rest takes."""

    def __init__(self) -> None:
        self._began = self._since = time.monotonic()
        self._before: int | None = None

    def describe(self, done: int, total: int, unit: str) -> str:
        """Return `done of total, rate, time left` in a unit for people.

        What is done at once was done before the stage, and does not count. Where the first report
        is of little, a stage had to start first, such as a program: time counts from that report.
        Rate and time left are left out until they mean something.
        """
        now = time.monotonic()
        if now - self._began < _AT_ONCE_S:
            self._before = done
        elif self._before is None:
            first = not total or done * _ENOUGH < total
            self._before, self._since = (done, now) if first else (0, self._began)
        amount = _megabytes if unit == "bytes" else str
        text = f"{amount(done)} of {amount(total)}" if total else amount(done)
        if unit != "bytes":
            text += f" {unit}"
        gone, seconds = done - (self._before or 0), now - self._since
        if gone <= 0 or seconds <= 0.5:
            return text
        rate = gone / seconds
        if unit == "bytes":
            text += f", {_megabytes(int(rate))}/s"
        else:
            text += f", {rate:.1f}/s" if rate >= 0.1 else f", {1 / rate:.0f} s each"
        if total > done and (gone * _ENOUGH >= total or seconds >= _LONG_S):
            text += f", {clock((total - done) / rate)} left"
        return text


def _megabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
