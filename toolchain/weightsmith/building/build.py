"""`invoke build`: runs a build's steps, records them, and yields each target's image."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from functools import partial

from weightsmith.building.checks import (
    check_before_work,
    check_images,
    check_machine,
    check_places,
    check_tags,
)
from weightsmith.building.choosing import CandidateLeft, check_choice, choose
from weightsmith.building.graph import BuildRun, foresee
from weightsmith.building.pipeline import steps_of
from weightsmith.building.record import BuiltTarget, Record
from weightsmith.building.request import BuildRequest
from weightsmith.core.errors import CacheLost, CheckFailed, InputRefused, WeightsmithError
from weightsmith.evaluating.build_record import StageRecord
from weightsmith.evaluating.results import check_contamination, keep_replay, unproven_of
from weightsmith.steps.step import AnyStep
from weightsmith.steps.tools import Tools

_MOST_LOSSES = 20
"""Results that a shared cache may lose in one build; more, and the cache itself is broken."""


def build(request: BuildRequest, tools: Tools) -> Iterator[BuiltTarget]:
    """Yield each target's image: merged, quantized, planned, baked, evaluated, published.

    The target `auto` comes last, when others have shown that base and adapters are sound.
    """
    if request.auto:
        check_choice(request)
    if request.targets or not request.auto:
        yield from _until_read(request, tools)
    if request.auto:
        yield from choose(request, tools, partial(_until_read, tools=tools))


def _until_read(request: BuildRequest, tools: Tools) -> Iterator[BuiltTarget]:
    """Yield the image of each target that has a name.

    If a result in a shared cache cannot be read, the build starts again without it: what was
    finished is in the store, and what was published is not published again.
    """
    published: set[str] = set()
    for losses in range(_MOST_LOSSES + 1):
        try:
            for built in _build(request, published, tools):
                published.add(built.target.name)
                yield built
        except CacheLost as lost:
            if losses == _MOST_LOSSES:
                raise
            tools.progress.note(f"{lost.message}; it is made here instead")
        else:
            return


def _build(request: BuildRequest, published: set[str], tools: Tools) -> Iterator[BuiltTarget]:
    check_places(request)
    request = request.pinned()
    steps = steps_of(request)
    check_machine(request, steps, tools)
    with BuildRun(steps, tools) as run:
        sources = run.perform(steps.sources)
        check_tags(request, sources, tools)
        check_contamination(request.file, steps.tasks, tools.progress)
        seen = foresee(steps, tools, sources)
        check_before_work(request, steps, seen)
        check_images(request, steps, seen)
        run.plan_by(seen)
        shared = Record(request=request, steps=steps, run=run, tools=tools)
        for step in steps.shared[1:]:
            _perform(step, shared)
        for target in steps.targets:
            if target.of.target.name not in published:
                record = replace(shared, target=target)
                for step in target.steps:
                    _perform_own(step, record)
                for reason in unproven_of(record.trial.results):
                    tools.progress.warn(f"published, but not proven: {reason}")
                built = record.keep()
                if request.keep_replay:
                    _keep_replay(record)
                yield built


def _perform_own(step: AnyStep, record: Record) -> None:
    """Run a target's step; raise CandidateLeft for a candidate that it refuses."""
    try:
        _perform(step, record)
    except (CheckFailed, InputRefused) as error:
        if record.request.choice:
            row = record.candidate(step.name, error)
            tested = step.asks and error.details.get("asked", True) is not False
            raise CandidateLeft(row, error, tested=tested) from None
        raise


def run_stages(
    request: BuildRequest, names: Collection[str], tools: Tools
) -> Iterator[Mapping[str, StageRecord]]:
    """Run the stages of these names, of the first target; yield the records after each.

    For work that several builds share: nothing is judged, since what one of them refuses may be
    right for the others. Raises what the stages raise.
    """
    request = request.pinned()
    steps = steps_of(request)
    with BuildRun(steps, tools) as run:
        record = Record(request=request, steps=steps, run=run, tools=tools)
        of = steps.targets[0].of if steps.targets else None
        for step in steps:
            if step.name in names and step.of in (None, of):
                _perform(step, record, judge=False)
                yield run.records(of)
            if step is steps.sources:
                sources = run.have[steps.sources]
                run.plan_by(foresee(steps, tools, sources, only=steps.shared))


def _keep_replay(record: Record) -> None:
    """Write the image's replay set beside the recipe; raises EnvironmentFailure."""
    name, progress = record.target.of.target.name if record.target else "", record.tools.progress
    if record.replay is None:
        progress.warn(f"{name}: the image has no replay set to keep")
    else:
        path = keep_replay(record.request.file, name, record.replay.made)
        progress.note(f"{name}: its replay set is in {path}")


def _perform(step: AnyStep, record: Record, *, judge: bool = True) -> None:
    """Run a step; record what was refused, and what was published though more may fail."""
    if step.reads_record:
        record.keep()
    try:
        record.run.perform(step)
    except CheckFailed as error:
        if step.proves:
            raise record.refusal(step, error) from None
        raise
    except WeightsmithError:
        if step.before_publishing:
            record.discard_candidate()
        raise
    try:
        if judge:
            step.judge(record.run.have)
    except CheckFailed as error:
        raise record.refusal(step, error) from None
    forms_follow = record.target and record.target.forms
    if step.publishes and forms_follow and not record.names_published():
        record.keep()
