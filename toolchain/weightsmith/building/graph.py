"""Foresees and runs a build's steps: each once, some at the same time or in one process.

What runs when is decided here: `BuildRun.perform` and `shares`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Self, TypeVar

from weightsmith.building.pipeline import BuildSteps
from weightsmith.building.prefetch import Prefetch, Shares, WithinMemory
from weightsmith.core.values import JsonValue, Sources
from weightsmith.evaluating.build_record import StageRecord
from weightsmith.serving.architectures import check_served
from weightsmith.stages.merge import merged_model
from weightsmith.steps.step import AnyStep, Foresight, PlanRow, Results, Step, TargetBuild
from weightsmith.steps.tools import Tools

T = TypeVar("T")

_LEFT = 256 << 20
"""What the reference answers leave in memory for a validation in the same process to start from."""


class BuildRun:
    """A build that runs; what was begun ahead of its turn ends with the block."""

    def __init__(self, steps: BuildSteps, tools: Tools) -> None:
        self.have = Results()
        """What the steps gave so far."""
        self._steps, self._tools = steps, tools
        self._seen: Foresight | None = None
        self._shares: Shares | None = None
        self._prefetch = Prefetch()

    def __enter__(self) -> Self:
        """Begin nothing yet."""
        return self

    def __exit__(self, *_: object) -> None:
        """End what was begun ahead of its turn."""
        self._prefetch.close()

    def plan_by(self, seen: Foresight) -> None:
        """Decide what runs beside what, from now on, by what was foreseen."""
        self._seen, self._shares = seen, shares(self._steps, seen)

    def perform(self, step: Step[T, object]) -> T:
        """Run a step; raises what it raises."""
        if step.allows_prefetch and self._shares and not self._prefetch.started:
            self._prefetch.start(_prefetchable(self._steps), self.have, self._tools, self._shares)
        if self._prefetch.has(step):
            self.have.put(step, self._prefetch.take(step))
            return self.have[step]
        # A later step's job runs in this step's process, if one job may use both's memory.
        later = next((one for one in self._steps.shared if one.joins is step), None)
        if later and self._seen:
            limit, both = self._tools.memory.limit, _peak(self._seen, (step, later)) + _LEFT
            if (not limit or both <= limit) and (joined := later.join(self.have, self._tools)):
                self.have.joined |= {step: joined, later: joined}
        tools = self._tools
        if self._shares and self._prefetch.waits:  # another job runs
            tools = replace(tools, runner=WithinMemory(tools.runner, self._shares.now))
        self.have.put(step, step.run(self.have, tools))
        return self.have[step]

    def records(self, of: TargetBuild | None) -> Mapping[str, StageRecord]:
        """Return how long each stage of a target took, and whether it was cached, in order."""
        found: dict[str, StageRecord] = {}
        for _, outcome in self.have.outcomes(of):
            if outcome.stage:
                before = found.get(outcome.stage, StageRecord(cached=True, seconds=0.0))
                found[outcome.stage] = StageRecord(
                    cached=before.cached and outcome.cached,
                    seconds=round(before.seconds + outcome.seconds, 3),
                )
        return found


def foresee(
    steps: BuildSteps,
    tools: Tools,
    sources: Sources | None = None,
    earlier: Mapping[tuple[str, str], Mapping[str, JsonValue]] | None = None,
    *,
    only: Iterable[AnyStep] | None = None,
) -> Foresight:
    """Return what running the steps, or `only` some, gives and takes; refuse what it would refuse.

    `sources` are those that were resolved; without, those that are on this machine. Raises NotHere
    if some are missing.
    """
    seen = Foresight(tools, earlier)
    if sources:
        seen.know(steps.sources, sources)
    else:
        sources = seen.see(steps.sources)
    check_served(merged_model(sources))
    for step in steps if only is None else only:
        if step is not steps.sources:
            seen.see(step)
    return seen


def disk_needed(steps: Iterable[AnyStep], seen: Foresight) -> int:
    """Return the bytes that these steps, as far as they are to do, need on the store's disk."""
    todo = [row for step in steps for row in seen.rows(step) if not row.cached]
    return sum(row.write_bytes for row in todo) + temporary_bytes(todo)


def temporary_bytes(todo: Sequence[PlanRow]) -> int:
    """Return how many bytes the largest temporary files take.

    Of the stages that run beside another, only one writes more than a few answers.
    """
    return max((row.disk_bytes - row.write_bytes for row in todo), default=0)


def shares(steps: BuildSteps, seen: Foresight) -> Shares | None:
    """Return the memory of both sides while the first target's weights are made ahead.

    None if they are made in their turn: with one CPU or a GPU, whose memory nobody plans for two
    jobs; if their builder must be made first; or if both sides together need more than a job that
    can choose may fill. So without --memory, each side may use at least twice what it is known to
    need.
    """
    tools, memory = seen.tools, seen.tools.memory
    builders = [name for step in _prefetchable(steps) for name in step.builders()]
    now, ahead = _sides(steps, seen)
    if not (builders and now and tools.two_at_once() and all(map(tools.runner.ready, builders))):
        return None
    if not memory.limit:
        return Shares(now=0, ahead=0)
    if now + ahead > memory.budget:
        return None
    # By need: halves would refuse a pair of which one needs little.
    share = memory.limit * ahead // (now + ahead)
    return Shares(now=memory.limit - share, ahead=share)


def peak_memory(steps: BuildSteps, seen: Foresight) -> int:
    """Return the most memory in bytes of what is to do, some of it at once."""
    todo = {step for step in steps if any(not row.cached for row in seen.rows(step))}
    largest = max(
        (row.peak_memory_bytes for step in todo for row in seen.rows(step) if not row.cached),
        default=0,
    )
    beside = any(step.allows_prefetch for step in todo.intersection(steps.shared))
    both = beside and todo.intersection(_prefetchable(steps))
    return max(largest, sum(_sides(steps, seen))) if both and shares(steps, seen) else largest


def _sides(steps: BuildSteps, seen: Foresight) -> tuple[int, int]:
    """Return the peaks of both sides in bytes; the first is 0 if nothing comes before."""
    now = _peak(seen, (step for step in steps.shared if step.allows_prefetch))
    # The weights of other targets may be made in the same pass.
    alike = {(step.name, step.builders()) for step in _prefetchable(steps)}
    others = (step for one in steps.targets for step in one.steps)
    return now and now + _LEFT, _peak(
        seen, (step for step in others if (step.name, step.builders()) in alike)
    )


def _prefetchable(steps: BuildSteps) -> tuple[AnyStep, ...]:
    """Return the first target's steps that may run ahead, before those that run beside them."""
    ready = {step for step in steps.shared if not step.allows_prefetch}
    found: list[AnyStep] = []
    for step in steps.targets[0].steps:
        if step.prefetched and ready.issuperset(step.needs):
            found.append(step)
            ready.add(step)
    return tuple(found)


def _peak(seen: Foresight, steps: Iterable[AnyStep]) -> int:
    return max((row.peak_memory_bytes for step in steps for row in seen.rows(step)), default=0)
