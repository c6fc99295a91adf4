"""Foresees a build's steps, for its plan and for the checks before its work."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from weightsmith.building.pipeline import AnyStep, BuildSteps
from weightsmith.core.values import JsonValue, Sources
from weightsmith.models.facts import read_facts
from weightsmith.serving.architectures import check_served
from weightsmith.steps.step import Foresight, PlanRow
from weightsmith.steps.tools import Tools


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
    seen = Foresight(tools, earlier or {})
    if sources:
        seen.know(steps.sources, sources)
    else:
        sources = seen.see(steps.sources)
    check_served(read_facts(sources.base.tree.root))
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
