"""What a node does for one request: the pipeline's stages, as far as the task goes.

A cell without changes goes through every stage, in the fleet's own process, in less than a tenth of
a second. A fingerprint that skips all of it would be a second list of what a build depends on, and
wrong as soon as somebody forgets to extend it.
"""

from __future__ import annotations

import base64
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from weightsmith.building.build import build, run_stages
from weightsmith.building.pipeline import steps_of
from weightsmith.building.request import BuildRequest
from weightsmith.building.targets import chosen_targets
from weightsmith.core.errors import (
    CheckFailed,
    EnvironmentFailure,
    InputRefused,
    UsageError,
    WeightsmithError,
    of_machine,
)
from weightsmith.core.trees import below
from weightsmith.core.values import JsonValue
from weightsmith.evaluating.build_record import BuildRecord, StageRecord, SuiteRecord, read_build
from weightsmith.evaluating.results import task_of
from weightsmith.evaluating.walks import has_head, subjects, worded
from weightsmith.evaluating.walks import inputs as answer_inputs
from weightsmith.fleets.payloads import unpack
from weightsmith.fleets.requests import (
    BASE,
    CELL,
    DIFFERENT,
    CellSuite,
    CellSummary,
    Failure,
    TaskReply,
    TaskRequest,
    version,
)
from weightsmith.recipe.file import RecipeFile, check_recipe, check_section
from weightsmith.recipe.schema import Suite
from weightsmith.stages.reference import answers
from weightsmith.stages.resolve import known
from weightsmith.steps.destinations import InStore
from weightsmith.steps.lock import pinned, read_lock
from weightsmith.steps.outputs import ImageOutputs
from weightsmith.steps.tools import Tools

_BASE_ANSWERS = "base answers"
"""Counted beside the stages of builds: what is done once for many of them."""
_REPORTS = 64 << 20
"""Bytes of a build's reports that are sent back; an image is never among them."""


@dataclass(slots=True)
class _Result:
    """What a task has to tell beside its error; `stages` are those done, whatever becomes of it."""

    stages: dict[str, StageRecord] = field(default_factory=dict)
    row: CellSummary | None = None
    lock: Mapping[str, JsonValue] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)


def answer(request: TaskRequest, tools: Tools) -> TaskReply:
    """Do one task, and return what became of it; a WeightsmithError is part of the reply."""
    began, cpu = time.monotonic(), sum(os.times()[:4])  # with those that it has waited for
    result, failure = _Result(), None
    with tools.scratch() as home:
        try:
            if request.version != (ours := version()):
                raise EnvironmentFailure(
                    f"{DIFFERENT} on {socket.gethostname()}: {ours}, and the fleet is "
                    f"{request.version}",
                    hint="install the same version on every node",
                )
            _do(request, home, result, tools)
        except WeightsmithError as error:
            failure = Failure.of(error)
            _take_refused(request, home, result)
        except OSError as error:
            if (refused := of_machine(error)) is None:
                raise
            failure = Failure.of(refused)
        return TaskReply(
            id=request.id,
            node=socket.gethostname(),
            seconds=round(time.monotonic() - began, 3),
            cpu_seconds=round(sum(os.times()[:4]) - cpu, 3),
            row=result.row,
            error=failure,
            stages={name: row.cached for name, row in result.stages.items()},
            lock=result.lock,
            bytes_moved=result.row.uploaded_bytes if result.row else 0,
            files=result.files,
        )


def _do(request: TaskRequest, home: Path, result: _Result, tools: Tools) -> None:
    tools = replace(tools, two_at_once=lambda: False)  # other tasks use the other CPUs and memory
    file, given = _written(request, home, tools), request.outputs
    layout, push = given.get("layout"), bool(given.get("push"))
    asked = BuildRequest(
        file=file,
        targets=chosen_targets(file, request.targets, to_build=True) if request.targets else (),
        outputs=ImageOutputs(
            load=bool(given.get("load")),
            push=push,
            force=bool(given.get("force")),
            tag_digest=push,
            layout=Path(str(layout)) if layout else None,
        ),
        dist=_dist(request, home),
        engine_answers=tools.images_in_engine,
    )
    if asked.dist != Path(request.dist) and request.kind == CELL and not (push and not layout):
        raise EnvironmentFailure(
            f"{socket.gethostname()} does not share the folder {request.dist}, so the image cannot "
            "be put there",
            hint="give --push, or with --dist a folder that all nodes share",
        )
    if request.kind == CELL:
        (built,) = build(asked, tools)
        result.stages |= built.stages
        record = read_build(asked.folder(built.target))
        result.row = _row_of(record, built.report, built.published.reference)
    else:
        if request.kind == BASE:
            _prepare(asked, tools)
        for records in run_stages(asked, request.stages, tools):
            result.stages |= records
        if request.questions:
            result.stages |= _answered(request, file, tools)
    pins = read_lock(file)
    result.lock = {"sources": pins.sources, "bases": pins.bases}
    result.files = _reports(asked.dist) if asked.dist != Path(request.dist) else {}


def _prepare(asked: BuildRequest, tools: Tools) -> None:
    steps = steps_of(asked)
    for builder in steps.checkpoint.builders():
        tools.runner.prepare(builder, tools.progress)
    for target in steps.targets:
        for builder in target.weights.builders():
            with _left_to_cells(tools, WeightsmithError):
                tools.runner.prepare(builder, tools.progress)


def _answered(request: TaskRequest, file: RecipeFile, tools: Tools) -> Mapping[str, StageRecord]:
    """Answer the questions that several adapters share, with the base alone."""
    sources, _ = known(pinned(file, read_lock(file)), tools)
    if sources is None:
        raise AssertionError("the base was fetched just now")
    asked, cached, began = subjects(sources, None), True, time.monotonic()
    for settings in request.questions:
        with _left_to_cells(tools, UsageError, InputRefused, CheckFailed):
            suite = check_section(Suite, settings, "evaluate")
            task = worded(task_of(file, suite).task, sources)
            if not has_head(sources.base.tree, task.pooled):
                continue
            cached &= tools.store.find(answer_inputs(asked["base"], task).key) is not None
            answers(asked, task, InStore(tools.store), tools)
    seconds = round(time.monotonic() - began, 3)
    return {_BASE_ANSWERS: StageRecord(cached=cached, seconds=seconds)}


@contextmanager
def _left_to_cells(tools: Tools, *kinds: type[WeightsmithError]) -> Iterator[None]:
    """Go on after a fault in what only some cells need: they will refuse for it, and no others."""
    try:
        yield
    except kinds as error:
        tools.progress.warn(f"{error.message}; the cells that need it will say so")


def _written(request: TaskRequest, home: Path, tools: Tools) -> RecipeFile:
    """Write what a recipe names into a folder, and the lock; check the recipe as a user's."""
    unpack(request, home, tools)
    recipe, path = check_recipe(request.recipe, request.adapter), home / "recipe.yaml"
    lock = {"sources": {}, "bases": {}, **request.lock}
    path.with_suffix(".lock").write_text(json.dumps(lock), "utf-8")
    return RecipeFile(recipe=recipe, folder=home, path=path, lasting=False)


def _dist(request: TaskRequest, home: Path) -> Path:
    """Return the folder of results: the user's if this node shares it, else one of our own."""
    shared = (Path(request.dist) / request.token).is_file()
    return Path(request.dist) if shared else home / "dist"


def _reports(dist: Path) -> dict[str, str]:
    """Return what a build wrote beside its image, as base64 by path; {} if that is too much."""
    paths = [path for path in below(dist) if path.is_file()] if dist.is_dir() else []
    if sum(path.stat().st_size for path in paths) > _REPORTS:
        return {}
    return {
        path.relative_to(dist).as_posix(): base64.b64encode(path.read_bytes()).decode()
        for path in paths
    }


def _take_refused(request: TaskRequest, home: Path, result: _Result) -> None:
    """Take what a build that stopped has left: its record, if it wrote one."""
    dist, recipe = _dist(request, home), request.recipe
    folder = dist / str(recipe.get("name")) / str(recipe.get("version", "0.1.0"))
    for place in (*(folder / target / "refused" for target in request.targets), folder / "refused"):
        with suppress(OSError, ValueError):
            record = read_build(place)
            result.row = _row_of(record, place / "report.html", "")
            result.stages = dict(record.stages) or result.stages
            result.files = {} if dist == Path(request.dist) else _reports(dist)
            return


def _row_of(record: BuildRecord, report: Path, reference: str) -> CellSummary:
    # An image that was not started has the score of its dequantized weights, if they were asked.
    answered = next((who for who in ("image", "dequantized") if who in record.scores), "")
    score = record.scores.get(answered)
    drops = [v.comparison for v in record.verdicts if v.subject == answered and v.comparison]
    image = record.image
    return CellSummary(
        verdict="refused" if record.refused else record.verdict,
        score=score.score if score else None,
        answered=answered,
        interval=score.interval if score else None,
        drop=drops[0].drop if drops else None,
        suites=tuple(map(_suite, record.tasks)) if len(record.tasks) > 1 else (),
        size=record.artifact.size if record.artifact else None,
        digest=image.digest if image and not record.refused else None,
        image=reference,
        report=str(report),
        uploaded_bytes=image.uploaded_bytes if image else 0,
    )


def _suite(suite: SuiteRecord) -> CellSuite:
    last = next((v for v in reversed(suite.verdicts) if v.binding and v.comparison), None)
    return CellSuite(
        name=suite.name,
        verdict=suite.verdict,
        score=suite.scores[list(suite.scores)[-1]].score,
        drop=last.comparison.drop if last and last.comparison else None,
    )
