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
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

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
from weightsmith.evaluating.build_record import BuildRecord, StageRecord, read_build
from weightsmith.evaluating.results import task_of
from weightsmith.evaluating.walks import inputs as answer_inputs
from weightsmith.evaluating.walks import subjects
from weightsmith.fleets.payloads import unpacked
from weightsmith.fleets.requests import (
    BASE,
    CELL,
    DIFFERENT,
    CellSummary,
    Failure,
    TaskReply,
    TaskRequest,
    version,
)
from weightsmith.recipe.file import RecipeFile, check_recipe, check_section
from weightsmith.recipe.schema import Evaluate
from weightsmith.stages.reference import answers
from weightsmith.stages.resolve import known
from weightsmith.steps.delivery import ImageOutputs
from weightsmith.steps.destinations import InStore
from weightsmith.steps.lock import pinned, read_lock
from weightsmith.steps.tools import Tools

_BASE_ANSWERS = "base answers"
"""Counted beside the stages of builds: what is done once for many of them."""
_REPORTS = 64 << 20
"""Bytes of a build's reports that are sent back; an image is never among them."""


def answer(request: TaskRequest, tools: Tools) -> TaskReply:
    """Do one task, and return what became of it; a WeightsmithError is part of the reply."""
    began, cpu = time.monotonic(), _cpu()
    stages: dict[str, StageRecord] = {}
    result, failure = _Result(), None
    with tools.scratch() as home:
        try:
            _require_version(request)
            result = _do(request, home, stages, tools)
        except WeightsmithError as error:
            failure = Failure.of(error)
            result = _refused(request, home)
        except OSError as error:
            if (refused := of_machine(error)) is None:
                raise
            failure = Failure.of(refused)
        return TaskReply(
            id=request.id,
            node=socket.gethostname(),
            seconds=round(time.monotonic() - began, 3),
            cpu_seconds=round(_cpu() - cpu, 3),
            row=result.row,
            error=failure,
            stages={name: row.cached for name, row in (result.stages or stages).items()},
            lock=result.lock,
            bytes_moved=result.row.uploaded_bytes if result.row else 0,
            files=result.files,
        )


def _cpu() -> float:
    """Return the CPU seconds of this process and of those that it has waited for."""
    return sum(os.times()[:4])


class _Result:
    """What a task has to tell beside its error."""

    def __init__(
        self,
        row: CellSummary | None = None,
        stages: Mapping[str, Any] | None = None,
        lock: Mapping[str, JsonValue] | None = None,
        files: Mapping[str, str] | None = None,
    ) -> None:
        self.row, self.stages = row, stages or {}
        self.lock, self.files = lock or {}, files or {}


def _require_version(request: TaskRequest) -> None:
    if request.version != (ours := version()):
        raise EnvironmentFailure(
            f"{DIFFERENT} on {socket.gethostname()}: {ours}, and the fleet is {request.version}",
            hint="install the same version on every node",
        )


def _do(request: TaskRequest, home: Path, stages: dict[str, StageRecord], tools: Tools) -> _Result:
    """Do a task; `stages` are filled with what was done, whatever becomes of it."""
    tools = replace(tools, two_at_once=lambda: False)  # other tasks use the other CPUs and memory
    file = _written(request, home, tools)
    targets = chosen_targets(file, request.targets, to_build=True) if request.targets else ()
    asked = BuildRequest(
        file=file,
        targets=targets,
        outputs=_outputs(request),
        dist=_dist(request, home),
        engine_answers=tools.images_in_engine,
    )
    row: CellSummary | None = None
    if request.kind == CELL:
        (built,) = build(asked, tools)
        stages |= built.stages
        row = row_of(
            read_build(asked.folder(built.target)), built.report, built.published.reference
        )
    else:
        if request.kind == BASE:
            _prepare(asked, tools)
        for records in run_stages(asked, request.stages, tools):
            stages |= records
        if request.questions:
            stages |= _answered(request, file, tools)
    lock = read_lock(file)
    return _Result(
        row=row,
        lock={"sources": lock.sources, "bases": lock.bases},
        files=_reports(asked.dist) if asked.dist != Path(request.dist) else {},
    )


def _prepare(asked: BuildRequest, tools: Tools) -> None:
    """Make the builders that the cells need."""
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
            task = task_of(file, check_section(Evaluate, settings, "evaluate")).task
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
    """Write the lock of a recipe and what it names into a folder, and check it as a user's."""
    recipe = check_recipe(unpacked(request, home, tools), request.adapter)
    path = home / "recipe.yaml"
    path.with_suffix(".lock").write_text(
        json.dumps({"sources": {}, "bases": {}, **request.lock}), "utf-8"
    )
    return RecipeFile(recipe=recipe, folder=home, path=path, lasting=False)


def _outputs(request: TaskRequest) -> ImageOutputs:
    given = request.outputs
    layout = given.get("layout")
    return ImageOutputs(
        load=bool(given.get("load")),
        push=bool(given.get("push")),
        force=bool(given.get("force")),
        tag_digest=bool(given.get("push")),
        layout=Path(str(layout)) if layout else None,
    )


def _dist(request: TaskRequest, home: Path) -> Path:
    """Return the folder of results: the user's if this node shares it, else one of our own."""
    if (Path(request.dist) / request.token).is_file():
        return Path(request.dist)
    given = request.outputs
    if request.kind == CELL and not (given.get("push") and not given.get("layout")):
        raise EnvironmentFailure(
            f"{socket.gethostname()} does not share the folder {request.dist}, so the image cannot "
            "be put there",
            hint="give --push, or with --dist a folder that all nodes share",
        )
    return home / "dist"


def _reports(dist: Path) -> dict[str, str]:
    """Return what a build wrote beside its image, as base64 by path; {} if that is too much."""
    paths = [path for path in below(dist) if path.is_file()] if dist.is_dir() else []
    if sum(path.stat().st_size for path in paths) > _REPORTS:
        return {}
    return {
        path.relative_to(dist).as_posix(): base64.b64encode(path.read_bytes()).decode()
        for path in paths
    }


def _refused(request: TaskRequest, home: Path) -> _Result:
    """Return what a build that stopped has left: its record, if it wrote one."""
    shared = (Path(request.dist) / request.token).is_file()
    dist = Path(request.dist) if shared else home / "dist"
    name, number = str(request.recipe.get("name")), str(request.recipe.get("version", "0.1.0"))
    places = [dist / name / number / t / "refused" for t in request.targets]
    for folder in (*places, dist / name / number / "refused"):
        try:
            record = read_build(folder)
        except (OSError, ValueError):
            continue
        row = row_of(record, folder / "report.html", "")
        return _Result(row=row, stages=record.stages, files={} if shared else _reports(dist))
    return _Result()


def row_of(record: BuildRecord, report: Path, reference: str) -> CellSummary:
    """Return what the fleet's table shows of a build.

    An image that was not started has the score of its dequantized weights, if they were asked.
    """
    answered = next((who for who in ("image", "dequantized") if who in record.scores), "")
    score = record.scores.get(answered)
    drops = [v.comparison for v in record.verdicts if v.subject == answered and v.comparison]
    image = record.image
    return CellSummary(
        verdict="refused" if record.refused else record.verdict,
        score=score.score if score else None,
        answered=answered,
        interval=score.interval if score else None,
        n=score.n if score else 0,
        drop=drops[0].drop if drops else None,
        size=record.artifact.size if record.artifact else None,
        digest=image.digest if image and not record.refused else None,
        image=reference,
        report=str(report),
        created=record.created,
        uploaded_bytes=image.uploaded_bytes if image else 0,
        mounted=image.mounted if image else 0,
    )
