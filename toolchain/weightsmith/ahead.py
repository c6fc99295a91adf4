"""Runs work ahead of its turn, in a thread, beside the stages that come before it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Generic, Self, TypeVar

from weightsmith.held import Held
from weightsmith.jobs import Job
from weightsmith.ports import Progress, Runner
from weightsmith.runners import WithinMemory, Wrapped
from weightsmith.tools import Tools
from weightsmith.values import Json
from weightsmith.waiting import stopped_by

T = TypeVar("T")

_PATIENCE = 15.0
"""Seconds for work that is not wanted any more to put its files away; its job ends at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """The most bytes for each of two jobs that run at once; 0 for no limit."""

    now: int
    ahead: int


class Ahead(Generic[T]):
    """At most one piece of work that is begun ahead of its turn, and ends with the block.

    Nobody sees it before its turn: what it says is held back, and its error is raised only then. If
    the block ends first, for an error or an interrupt, its job is killed and the work ends as on
    Ctrl-C, so that what can be resumed is kept.
    """

    def __init__(self, tools: Tools) -> None:
        self._tools = tools
        self._held = Held(tools.progress)
        self._name = ""
        self._stop = -1
        """An open file that can be read once the work must end."""
        self._ended = threading.Event()
        self._value: list[T] = []
        self._error: BaseException | None = None

    def __enter__(self) -> Self:
        """Begin nothing yet."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the work, if it still runs, and wait until it has let go of everything."""
        if self._stop < 0:
            return
        os.eventfd_write(self._stop, 1)
        if self._ended.wait(_PATIENCE):  # else the file is left open: the thread still reads it
            os.close(self._stop)

    def start(self, name: str, work: Callable[[Tools], T], shares: Shares) -> Tools:
        """Begin the work of this name; return the tools for the stages before it."""
        self._name, self._stop = name, os.eventfd(0)
        runner = Stopped(WithinMemory(self._tools.runner, shares.ahead), self._stop)
        tools = replace(self._tools, runner=runner, progress=self._held)
        # A daemon, so that an interrupted command does not wait for it at its very end.
        threading.Thread(target=self._run, args=(work, tools), daemon=True, name="ahead").start()
        return replace(self._tools, runner=WithinMemory(self._tools.runner, shares.now))

    def _run(self, work: Callable[[Tools], T], tools: Tools) -> None:
        try:
            with stopped_by(self._stop):
                self._value.append(work(tools))
        except BaseException as error:  # noqa: BLE001 - raised in its turn
            self._error = error
        finally:
            self._ended.set()

    def result(self, name: str, work: Callable[[Tools], T]) -> T:
        """Return what the work of this name returned, or raise its error; do it now if not begun.

        From now on, what it says is shown.
        """
        if name != self._name:
            return work(self._tools)
        self._held.follow()
        self._ended.wait()
        if self._error is not None:
            raise self._error
        return self._value[0]


class Stopped(Wrapped):
    """A runner whose jobs end once the file `stop` can be read."""

    def __init__(self, runner: Runner, stop: int) -> None:
        super().__init__(runner)
        self._stop = stop

    def run(self, job: Job, progress: Progress, *, stop: int | None = None) -> Mapping[str, Json]:
        """Run the job; raises KeyboardInterrupt if it was stopped, as stages know it."""
        try:
            return self.runner.run(job, progress, stop=self._stop if stop is None else stop)
        except InterruptedError:
            raise KeyboardInterrupt from None
