"""Holds back what work says that is run ahead of its turn."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial

from weightsmith.core.ports import Progress


class BufferedProgress:
    """A Progress that holds back what is said until `follow`, and then passes all of it on."""

    def __init__(self, inner: Progress) -> None:
        self._inner = inner
        self._lock = threading.Lock()
        self._said: list[Callable[[], None]] | None = []
        self._last: Callable[[], None] | None = None
        """The last `advance`, if nothing was said after it."""

    @property
    def warnings(self) -> Sequence[str]:
        """Those that were shown."""
        return self._inner.warnings

    def follow(self) -> None:
        """Say all that was held back, of each bar only where it stands."""
        with self._lock:
            for say in (*(self._said or ()), *filter(None, [self._last])):
                say()
            self._said = self._last = None

    def stage(self, name: str, detail: str) -> None:
        """Report the start of a stage."""
        self._say(partial(self._inner.stage, name, detail))

    def advance(self, done: int, total: int, unit: str) -> None:
        """Report work done so far."""
        self._say(partial(self._inner.advance, done, total, unit), moves=True)

    def finish(self, name: str, seconds: float, cached: bool) -> None:
        """Report the end of a stage."""
        self._say(partial(self._inner.finish, name, seconds, cached))

    def note(self, text: str) -> None:
        """Print a line."""
        self._say(partial(self._inner.note, text))

    def warn(self, text: str) -> None:
        """Print a warning line."""
        self._say(partial(self._inner.warn, text))

    def _say(self, say: Callable[[], None], *, moves: bool = False) -> None:
        """Say it in its turn; of several moves of one bar, the last."""
        with self._lock:
            if self._said is None:
                say()
            else:
                self._last = say if moves else None
                self._said += [] if moves else [say]
