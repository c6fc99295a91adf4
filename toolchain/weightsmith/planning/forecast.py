"""Forecasts a build: which stages are cached, why others are not, and what they cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from weightsmith.build_record import read_build
from weightsmith.checkpoints.facts import read_facts
from weightsmith.errors import UsageError
from weightsmith.evaluating.results import RecipeTask
from weightsmith.planning.advice import advice_for
from weightsmith.planning.ahead import peak_memory
from weightsmith.planning.cache_scales import forecast_scales, missing
from weightsmith.planning.checks import check_assembly, check_format, check_places
from weightsmith.planning.dequantized import forecast_dequantized
from weightsmith.planning.forecast_rows import (
    Known,
    merge_rows,
    publish_row,
    quality_rows,
    quantize_row,
    reference_rows,
    row,
    validate_rows,
)
from weightsmith.planning.foreseen import foreseen
from weightsmith.planning.layer_time import measured_layer_time, stage_seconds, with_times
from weightsmith.planning.options import (
    needs_files,
    quantize_options,
    sources_to_merge,
    unmerged_adapters,
)
from weightsmith.planning.origins import origin_of
from weightsmith.planning.platforms import forecast_platforms
from weightsmith.planning.request import BuildRequest
from weightsmith.planning.serving import serving_config
from weightsmith.planning.sizes import estimated_bytes, expected_projector
from weightsmith.planning.tasks import check_leaks, probes, tasks_of
from weightsmith.recipe_file import RecipeFile
from weightsmith.serving.architectures import check_served
from weightsmith.serving.plan import ServingPlan
from weightsmith.serving.projector import Projector, projector_in
from weightsmith.serving.targets import Target
from weightsmith.stages import merge as merging
from weightsmith.stages.lock import pinned, read_lock, with_sources
from weightsmith.stages.publish import Outputs
from weightsmith.stages.resolve import known as sources_here
from weightsmith.tools import Tools
from weightsmith.values import LORA, Json, Sources, Tree

_NOWHERE = Outputs()


def forecast(
    file: RecipeFile,
    targets: Sequence[Target],
    dist: Path,
    tools: Tools,
    *,
    outputs: Outputs = _NOWHERE,
    locked: bool = False,
    update_lock: bool = False,
    measure: bool = False,
) -> Mapping[str, Json]:
    """Return stages, serving plans and totals of a build without running it.

    With `measure`, one layer of the model is timed, and rows have `seconds`. Sizes are in bytes.
    Raises what the build would raise before its first long step, except for lack of memory, which
    the rows show, and for what only a registry or a hub can say.
    """
    request = _request(file, targets, dist, outputs, tools)
    check_places(request)
    tasks = tasks_of(file)
    check_leaks(file, tasks, tools.progress)
    probes(file)
    lock = read_lock(file)
    file = file if update_lock else pinned(file, lock)
    sources, why = sources_here(file, tools)
    if sources is None:
        return _unresolved(file, targets, why)
    with_sources(lock, file, sources, progress=tools.progress, locked=locked, update=update_lock)
    check_served(read_facts(sources.base.tree.root))
    sources, note = foreseen(sources)
    known = _known(file, targets, sources, tasks, dist, tools, note)
    rows = [row("resolve", cached=not note, why=note, read=sources.base.tree.size)]
    rows += [*merge_rows(known), *validate_rows(known), *reference_rows(known)]
    plans, platforms = {}, {}
    for target in targets:
        found, plans[target.name], platforms[target.name] = _of_target(known, target)
        rows += found
    check_assembly(request, sources, {name: p.device for name, p in plans.items()}, tools)
    layer_time = measured_layer_time(sources, tools) if measure else None
    if layer_time is not None:
        args = (sources, tasks, file.recipe.quality.tokens, tools.memory.budget)
        rows = with_times(rows, lambda: stage_seconds(layer_time, known.model.shape, *args))
    todo = [one for one in rows if not one["cached"]]
    serving = {name: plan.to_json() for name, plan in plans.items()}
    return {
        "name": file.recipe.name,
        "version": file.recipe.version,
        "stages": rows,
        "serving": serving,
        "plan": serving,  # the same, under the name that `render` uses
        "platforms": platforms,
        "advice": advice_for(file, targets, sources, dist, tools),
        **({"layer_time": layer_time.to_json()} if layer_time else {}),
        "read_bytes": sum(int(one["read_bytes"]) for one in todo),
        "write_bytes": sum(int(one["write_bytes"]) for one in todo),
        "peak_memory_bytes": peak_memory(todo, file, targets, sources, tools),
        # Permanent files plus the largest temporary ones: of the stages that run beside another,
        # only one writes more than a few answers.
        "peak_disk_bytes": sum(int(one["write_bytes"]) for one in todo)
        + max((int(one["disk_bytes"]) - int(one["write_bytes"]) for one in todo), default=0),
    }


def _request(
    file: RecipeFile, targets: Sequence[Target], dist: Path, outputs: Outputs, tools: Tools
) -> BuildRequest:
    """Return the build that is foreseen."""
    return BuildRequest(
        file=file,
        targets=tuple(targets),
        outputs=outputs,
        dist=dist,
        engine_answers=tools.images_in_engine,
    )


def _known(
    file: RecipeFile,
    targets: Sequence[Target],
    sources: Sources,
    tasks: Sequence[RecipeTask],
    dist: Path,
    tools: Tools,
    note: str,
) -> Known:
    merged, files = sources_to_merge(targets, sources), needs_files(targets)
    checkpoint: Tree | None = None if note else sources.base.tree
    if merged.adapters:
        found = merging.find(merged, file.recipe.merge, tools.store, files=files)
        checkpoint = found.tree if found else None
    return Known(
        file=file,
        sources=sources,
        merged=merged,
        files=files,
        checkpoint=checkpoint,
        model=read_facts(sources.base.tree.root),
        tasks=tasks,
        earlier=_earlier(file, targets, dist),
        tools=tools,
        note=note,
    )


def _of_target(
    known: Known, target: Target
) -> tuple[list[dict[str, Json]], ServingPlan, Mapping[str, str]]:
    """Return the rows of a target's own stages, its serving plan and its platforms."""
    file, sources = known.file, known.sources
    origin = origin_of(target, sources, file.recipe.merge)
    model = origin.model
    known = replace(known, model=model)
    checkpoint, tools = known.checkpoint, known.tools
    options = quantize_options(file, target.format, sources.base, tools)
    quantizing, artifact = quantize_row(known, target, options, origin.size)
    rows = [*quantizing, *quality_rows(known, target, artifact, origin.size)]
    if uncalibrated := missing(file, target, model):
        tools.progress.warn(uncalibrated)
    if scales := forecast_scales(file, target, model, sources, checkpoint, tools):
        rows.append(row("cache-scales", **scales))
    weight = artifact.weight_bytes if artifact else 0
    weight = weight or estimated_bytes(origin.weight_bytes, target.format, model)
    beside = projector_in(artifact) if artifact else expected_projector(target, model)
    plan = _serving_plan(known, target, weight, beside)
    check_format(target, options, model, plan.device)
    platforms, engines = forecast_platforms(file, target, plan.device, tools)
    rows += [row("base", target=target.name, cached=cached, why=why) for cached, why in engines]
    given, made = (known.tasks, model), (checkpoint, artifact)
    if answers := forecast_dequantized(file, target, plan.device, *given, made, tools):
        rows.append(row("dequantized", **answers, read=weight))
    served = sources.adapters if target.format == LORA else ()
    whole = artifact.size if artifact else weight
    whole += sum(one.snapshot.tree.size for one in served)
    rows.append(publish_row(file, target, whole, made=artifact is not None))
    return rows, plan, platforms


def _serving_plan(
    known: Known, target: Target, weight: int, projector: Projector | None
) -> ServingPlan:
    """Return a target's plan; if it does not fit, the error's details have it by target name."""
    file, sources = known.file, known.sources
    adapters = unmerged_adapters(file, target, sources)
    try:
        return serving_config(
            file,
            target,
            known.model,
            weight,
            weights="",
            made_from=(),
            adapters=adapters,
            projector=projector,
            notes=(known.note,) if known.note else (),
        ).plan
    except UsageError as error:
        if "plan" not in error.details:
            raise
        details = {"plan": {target.name: error.details["plan"]}}
        raise UsageError(
            f"{target.name}: {error.message}", hint=error.hint, details=details
        ) from None


def _unresolved(file: RecipeFile, targets: Sequence[Target], missing: str) -> Mapping[str, Json]:
    """Return the forecast of a build whose sources are not on this machine."""
    why = "its inputs are not known before `resolve`"
    rows = [row("resolve", cached=False, why=missing)]
    rows += [row(stage, cached=False, why=why) for stage in ("merge", "validate", "reference")]
    rows += [row("quantize", target=t.name, cached=False, why=why) for t in targets]
    rows += [row("publish", target=t.name, cached=False, why=why) for t in targets]
    zeros = ("read_bytes", "write_bytes", "peak_memory_bytes", "peak_disk_bytes")
    return {
        "name": file.recipe.name,
        "version": file.recipe.version,
        "stages": rows,
        "serving": {},
        "plan": {},
        "platforms": {},
        "advice": None,
        **dict.fromkeys(zeros, 0),
    }


def _earlier(file: RecipeFile, targets: Sequence[Target], dist: Path) -> Mapping[str, Json]:
    """Return the inputs of the last build's stages, by stage and target."""
    found: dict[str, Json] = {}
    for target in targets:
        folder = dist / file.recipe.name / file.recipe.version / target.name
        try:
            inputs = read_build(folder).inputs
        except (OSError, ValueError):
            continue
        kept = ("merge", "validate", "reference")
        found |= {stage: inputs[stage] for stage in kept if stage in inputs}
        found[f"quantize {target.name}"] = inputs.get("quantize")
    return found
