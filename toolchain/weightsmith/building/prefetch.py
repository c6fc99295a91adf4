"""Runs steps ahead of their turn, in a thread, beside the steps that come before them.

Each stage imports its libraries on one CPU, and quantizing needs only the merged checkpoint. What
such a step says, and its error, is held back until its turn, so lines, records and digests are
those of a build in order. If a gate refuses, the job is killed as by Ctrl-C, so what can be resumed
is kept. Filling the store ahead and running the steps again would lose the job's warnings and its
time.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from weightsmith.core.jobs import Job
from weightsmith.core.ports import Progress, Runner
from weightsmith.core.values import JsonValue
from weightsmith.core.waiting import stopped_by
from weightsmith.steps.stage_result import StageResult
from weightsmith.steps.step import AnyStep, Results
from weightsmith.steps.tools import Tools


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """The most bytes for each of two jobs that run at once; 0 for no limit."""

    now: int
    ahead: int


class Prefetch:
    """Steps that are begun ahead of their turn.

    Nobody sees them before their turn: what they say is held back, an error is raised only then. If
    they are closed first, for an error or an interrupt, their job is killed and they end as on
    Ctrl-C, so that what can be resumed is kept; closing waits for that.
    """

    def __init__(self) -> None:
        self._steps: Sequence[AnyStep] = ()
        self._outcomes: dict[AnyStep, StageResult[Any]] = {}
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._ended = threading.Event()
        """Set at its end: an interrupted `join` treats a thread as ended (Python 3.11, 3.12)."""
        self._progress: _BufferedProgress | None = None
        self._stop = -1
        """An open file that can be read once the steps must end."""

    def close(self) -> None:
        """End the steps, if they still run, and wait until they have let go of everything."""
        if self._thread is None:
            return
        os.eventfd_write(self._stop, 1)
        self._ended.wait()
        os.close(self._stop)
        self._thread = None

    def start(self, steps: Sequence[AnyStep], have: Results, tools: Tools, shares: Shares) -> None:
        """Begin these steps, one after another, with their share of the memory."""
        self._steps, self._stop = steps, os.eventfd(0)
        self._progress = _BufferedProgress(tools.progress)
        runner = _Stoppable(WithinMemory(tools.runner, shares.ahead), self._stop)
        quiet_tools = replace(tools, runner=runner, progress=self._progress)
        # A daemon, so that a later Ctrl-C does not wait for it at the very end.
        self._thread = threading.Thread(
            target=self._run, args=(have.copy(), quiet_tools), daemon=True, name="prefetch"
        )
        self._thread.start()

    def _run(self, have: Results, tools: Tools) -> None:
        try:
            with stopped_by(self._stop):
                for step in self._steps:
                    self._outcomes[step] = outcome = step.run(have, tools)
                    have.put(step, outcome)
        except BaseException as error:  # noqa: BLE001 - raised in its turn
            self._error = error
        finally:
            self._ended.set()

    def has(self, step: AnyStep) -> bool:
        """Return whether a step was begun here."""
        return step in self._steps

    @property
    def started(self) -> bool:
        """Whether any steps were begun."""
        return bool(self._steps)

    @property
    def waits(self) -> bool:
        """Whether steps were begun whose turn has not come yet."""
        return self._progress is not None

    def take(self, step: AnyStep) -> StageResult[object]:
        """Return what a step gave, or raise its error; from now on, what they say is shown."""
        if self._progress:
            self._progress.follow()
            self._progress = None
        if self._thread:
            self._ended.wait()
        if step in self._outcomes:
            return self._outcomes[step]
        if self._error is None:
            raise AssertionError("a step that was begun has neither ended nor failed")
        raise self._error


class Wrapped:
    """A runner that hands everything to another one; what differs overrides `run`."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.name = runner.name

    @property
    def networked(self) -> bool:
        """As the other one."""
        return self.runner.networked

    def prepare(self, builder: str, progress: Progress) -> None:
        """Make the builder ready."""
        self.runner.prepare(builder, progress)

    def check(self, builder: str) -> None:
        """Raise EnvironmentFailure if it is certain that the builder cannot be made."""
        self.runner.check(builder)

    def ready(self, builder: str) -> bool:
        """Return whether the builder already exists."""
        return self.runner.ready(builder)

    def run(
        self, job: Job, progress: Progress, *, stop: int | None = None
    ) -> Mapping[str, JsonValue]:
        """Run the job and return its result; raises the job's own error."""
        return self.runner.run(job, progress, stop=stop)


class WithinMemory(Wrapped):
    """Lowers each job's memory limit to a number of bytes; 0 for no limit.

    A job that needs more then ends with an error of its own, before the machine swaps or the kernel
    kills another program.
    """

    def __init__(self, runner: Runner, limit: int) -> None:
        super().__init__(runner)
        self._limit = limit

    def run(
        self, job: Job, progress: Progress, *, stop: int | None = None
    ) -> Mapping[str, JsonValue]:
        """Run the job within the lower one of its own limit and this one."""
        limit = min(filter(None, (job.memory_bytes, self._limit)), default=0)
        return self.runner.run(replace(job, memory_bytes=limit), progress, stop=stop)


class _Stoppable(Wrapped):
    """A runner whose jobs end once the file `stop` can be read."""

    def __init__(self, runner: Runner, stop: int) -> None:
        super().__init__(runner)
        self._stop = stop

    def run(
        self, job: Job, progress: Progress, *, stop: int | None = None
    ) -> Mapping[str, JsonValue]:
        """Run the job; raises KeyboardInterrupt if it was stopped, as stages know it."""
        try:
            return self.runner.run(job, progress, stop=self._stop if stop is None else stop)
        except InterruptedError:
            raise KeyboardInterrupt from None


class _BufferedProgress:
    """A Progress that holds back what is said until `follow`, and then passes all of it on."""

    def __init__(self, inner: Progress) -> None:
        self._inner = inner
        self._lock = threading.Lock()
        self._said: list[Callable[[], None]] | None = []
        self._last: Callable[[], None] | None = None
        """The last `advance`, if nothing was said after it."""

    @property
    def warnings(self) -> Sequence[str]:
        return self._inner.warnings

    def follow(self) -> None:
        """Say all that was held back, of each bar only where it stands."""
        with self._lock:
            for say in (*(self._said or ()), *filter(None, [self._last])):
                say()
            self._said = self._last = None

    def stage(self, name: str, detail: str) -> None:
        self._say(partial(self._inner.stage, name, detail))

    def advance(self, done: int, total: int, unit: str) -> None:
        self._say(partial(self._inner.advance, done, total, unit), moves=True)

    def finish(self, name: str, seconds: float, cached: bool) -> None:
        self._say(partial(self._inner.finish, name, seconds, cached))

    def note(self, text: str) -> None:
        self._say(partial(self._inner.note, text))

    def warn(self, text: str) -> None:
        self._say(partial(self._inner.warn, text))

    def _say(self, say: Callable[[], None], *, moves: bool = False) -> None:
        with self._lock:
            if self._said is None:
                say()
            else:
                self._last = say if moves else None
                self._said += [] if moves else [say]
