"""Forecasts a build: which stages are cached, why others are not, and what they cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from weightsmith.build_record import read_build
from weightsmith.checkpoints.facts import ModelFacts, read_facts
from weightsmith.errors import UsageError
from weightsmith.evaluating.results import RecipeTask
from weightsmith.planning.advice import advice_for
from weightsmith.planning.ahead import peak_memory
from weightsmith.planning.cache_scales import forecast_scales, missing
from weightsmith.planning.checks import check_format, check_image_names
from weightsmith.planning.dequantized import forecast_dequantized
from weightsmith.planning.layer_time import measured_layer_time, stage_seconds, with_times
from weightsmith.planning.memory import (
    quality_memory,
    quantize_memory,
    reference_memory,
    validate_memory,
)
from weightsmith.planning.options import (
    needs_files,
    quantize_options,
    sources_to_merge,
    texts_of,
    unmerged_adapters,
)
from weightsmith.planning.platforms import forecast_platforms
from weightsmith.planning.request import has_gguf
from weightsmith.planning.serving import serving_config
from weightsmith.planning.sizes import disk_peak, estimated_bytes, expected_projector
from weightsmith.planning.targets import can_make
from weightsmith.planning.tasks import probes, tasks_of
from weightsmith.quantizers import of_format
from weightsmith.recipe_file import RecipeFile
from weightsmith.serving.memory import human
from weightsmith.serving.parameters import WORKED_OUT, weights_from_config
from weightsmith.serving.plan import ServingPlan
from weightsmith.serving.projector import Projector, projector_in
from weightsmith.serving.targets import Target
from weightsmith.stages import merge as merging
from weightsmith.stages import quality
from weightsmith.stages import quantize as quantizing
from weightsmith.stages import reference as references
from weightsmith.stages import validate as validating
from weightsmith.stages.lock import pinned, read_lock, with_sources
from weightsmith.stages.quantize import QuantizeOptions
from weightsmith.stages.resolve import known
from weightsmith.tools import Tools
from weightsmith.values import Json, Sources, StageInputs, Tree

HERE = "here"
"""Where a stage's result is, if it is on this machine."""


def forecast(
    file: RecipeFile,
    targets: Sequence[Target],
    dist: Path,
    tools: Tools,
    *,
    locked: bool = False,
    update_lock: bool = False,
    measure: bool = False,
) -> Mapping[str, Json]:
    """Return stages, serving plans and totals of a build without running it.

    With `measure`, one layer of the model is timed, and rows have `seconds`. Sizes are in bytes.
    Raises what the build would raise before its first long step, except for lack of memory, which
    the rows show.
    """
    check_image_names(file.recipe)
    tasks = tasks_of(file)
    lock = read_lock(file)
    file = file if update_lock else pinned(file, lock)
    sources, why = known(file, tools)
    if sources is None:
        return _unresolved(file, targets, why)
    with_sources(lock, file, sources, progress=tools.progress, locked=locked, update=update_lock)
    earlier = _earlier(file, targets, dist)
    rows = [_row("resolve", cached=True, why="", read=sources.base.tree.size)]
    whole = sources_to_merge(targets, sources)
    files = needs_files(targets)
    checkpoint = _checkpoint(file, whole, tools, files=files)
    rows += [_merge_row(file, whole, earlier, tools, files=files)]
    rows += _validate_rows(file, whole, checkpoint, earlier, tools)
    rows += _reference_rows(sources, tasks, earlier, tools)
    plans, platforms, model = {}, {}, read_facts(sources.base.tree.root)
    weights = sources.base.tree.weight_bytes or weights_from_config(model)
    for target in targets:
        options = quantize_options(file, target.format, sources.base, tools)
        row, artifact = _quantize_row(options, target, checkpoint, sources, earlier, tools)
        rows += [row, *_quality_rows(file, target, model, checkpoint, artifact, tools)]
        if uncalibrated := missing(file, target, model):
            tools.progress.warn(uncalibrated)
        if scales := forecast_scales(file, target, model, sources, checkpoint, tools):
            rows.append(_row("cache-scales", **scales))
        weight = artifact.weight_bytes if artifact else 0
        weight = weight or estimated_bytes(weights, target.format, model)
        beside = projector_in(artifact) if artifact else expected_projector(target, model)
        plans[target.name] = _serving_plan(file, target, sources, model, weight, beside)
        device = plans[target.name].device
        check_format(target, options, model, device)
        platforms[target.name], engines = forecast_platforms(file, target, device, tools)
        rows += [_row("base", target=target.name, cached=c, why=why) for c, why in engines]
        pair, given = (checkpoint, artifact), (file, target, device, tasks, sources, model)
        if answers := forecast_dequantized(*given, pair, tools):
            rows.append(_row("dequantized", **answers))
        rows.append(_publish_row(file, target, artifact, weight))
    layer_time = measured_layer_time(sources, tools) if measure else None
    if layer_time is not None:
        args = (sources, tasks, file.recipe.quality.tokens, tools.memory.budget)
        rows = with_times(rows, lambda: stage_seconds(layer_time, model.shape, *args))
    todo = [row for row in rows if not row["cached"]]
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
        "read_bytes": sum(int(row["read_bytes"]) for row in todo),
        "write_bytes": sum(int(row["write_bytes"]) for row in todo),
        "peak_memory_bytes": peak_memory(todo, file, targets, sources, tools),
        # Permanent files plus the largest temporary ones: of the stages that run beside another,
        # only one writes more than a few answers.
        "peak_disk_bytes": sum(int(row["write_bytes"]) for row in todo)
        + max((int(row["disk_bytes"]) - int(row["write_bytes"]) for row in todo), default=0),
    }


def _serving_plan(
    file: RecipeFile,
    target: Target,
    sources: Sources,
    model: ModelFacts,
    weight: int,
    projector: Projector | None,
) -> ServingPlan:
    """Return a target's plan; if it does not fit, the error's details have it by target name."""
    adapters = unmerged_adapters(file, target, sources)
    try:
        return serving_config(
            file,
            target,
            model,
            weight,
            weights="",
            made_from=(),
            adapters=adapters,
            projector=projector,
            notes=() if sources.base.tree.weight_bytes else (WORKED_OUT,),
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
    rows = [_row("resolve", cached=False, why=missing)]
    rows += [_row(stage, cached=False, why=why) for stage in ("merge", "validate", "reference")]
    rows += [_row("quantize", target=t.name, cached=False, why=why) for t in targets]
    rows += [_row("publish", target=t.name, cached=False, why=why) for t in targets]
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


def _merge_row(
    file: RecipeFile,
    sources: Sources,
    earlier: Mapping[str, Json],
    tools: Tools,
    *,
    files: bool,
) -> dict[str, Json]:
    if not sources.adapters:
        return _row("merge", cached=True, why="")
    stage = merging.inputs(sources, file.recipe.merge)
    cost, whole = (merging.check(sources, file.recipe.merge, files=f) for f in (files, True))
    state = _state(stage, earlier.get("merge"), tools)
    if not state["cached"] and cost["write_bytes"] < whole["write_bytes"]:
        saved = human(whole["write_bytes"] - cost["write_bytes"])
        unwritten = _state(merging.inputs(sources, file.recipe.merge, unwritten=True), None, tools)
        why = f"{state['why']}; every target is made from base and adapters: {saved} less disk"
        state = unwritten if unwritten["cached"] else {**state, "why": why}
    return _row(
        "merge",
        **state,
        read=cost["read_bytes"],
        write=cost["write_bytes"],
        memory=cost["peak_memory_bytes"],
    )


def _validate_rows(
    file: RecipeFile,
    sources: Sources,
    checkpoint: Tree | None,
    earlier: Mapping[str, Json],
    tools: Tools,
) -> list[dict[str, Json]]:
    if not sources.adapters or not file.recipe.validation.enabled:
        return []
    read = 2 * sources.base.tree.size + sum(a.snapshot.tree.size for a in sources.adapters)
    cost: dict[str, Json] = {
        "read": read,
        "memory": validate_memory(read_facts(sources.base.tree.root), sources),
    }
    if checkpoint is None:
        return [_row("validate", cached=False, why="merge comes first", **cost)]
    stage = validating.inputs(sources, file.recipe.merge, checkpoint.digest, probes(file))
    return [_row("validate", **_state(stage, earlier.get("validate"), tools), **cost)]


def _reference_rows(
    sources: Sources, tasks: Sequence[RecipeTask], earlier: Mapping[str, Json], tools: Tools
) -> list[dict[str, Json]]:
    if not tasks:
        return []
    before = earlier.get("reference")
    states = []
    for task in tasks:
        asked = references.subjects(sources, task.adapter)
        subject = asked.get("adapter", asked["base"])
        states.append(_state(references.inputs(subject, task.task), before, tools))
    state = next((one for one in states if not one["cached"]), states[-1])
    tree = sources.base.tree
    memory = reference_memory(read_facts(tree.root), sources, tasks, tools.memory)
    return [_row("reference", **state, read=tree.size, memory=memory)]


def _checkpoint(file: RecipeFile, sources: Sources, tools: Tools, *, files: bool) -> Tree | None:
    if not sources.adapters:
        return sources.base.tree
    found = merging.find(sources, file.recipe.merge, tools.store, files=files)
    return found.tree if found else None


def _quantize_row(
    options: QuantizeOptions,
    target: Target,
    checkpoint: Tree | None,
    sources: Sources,
    earlier: Mapping[str, Json],
    tools: Tools,
) -> tuple[dict[str, Json], Tree | None]:
    size, model = sources.base.tree.size, read_facts(sources.base.tree.root)
    if not target.format.packed:
        return _row("quantize", target=target.name, cached=True, why=""), checkpoint
    if not can_make(target.format):
        why = f"no installed quantizer makes {target.format.name}"
        return _row("quantize", target=target.name, cached=False, why=why, read=size), None
    row: dict[str, Json] = {
        "target": target.name,
        "read": size,
        "write": estimated_bytes(size, target.format, model),
        "memory": quantize_memory(model, size, options),
        "disk": disk_peak(size, target.format, model, options.options),
    }
    if checkpoint is None:
        return _row("quantize", cached=False, why="merge comes first", **row), None
    stage = quantizing.inputs(checkpoint.digest, options)
    state, entry = _state(stage, earlier.get(f"quantize {target.name}"), tools), None
    if state["cached"]:
        entry = tools.store.find(stage.key)
    else:
        state["why"] += f" ({of_format(target.format.name).name})"
    return _row("quantize", **state, **row), entry.tree if entry else None


def _quality_rows(
    file: RecipeFile,
    target: Target,
    model: ModelFacts,
    checkpoint: Tree | None,
    artifact: Tree | None,
    tools: Tools,
) -> list[dict[str, Json]]:
    if not target.format.packed or not can_make(target.format) or file.recipe.quality.gate is False:
        return []
    texts = texts_of(file)
    state: dict[str, Json] = {"cached": False, "why": "its weights do not exist yet"}
    if checkpoint and artifact:
        stage = quality.inputs(
            checkpoint.digest, artifact.digest, texts, file.recipe.quality.tokens
        )
        state = _state(stage, None, tools)
    size = checkpoint.size if checkpoint else 0
    memory = quality_memory(model, file.recipe.quality.tokens)
    return [_row("quality", target=target.name, **state, read=size, memory=memory)]


def _publish_row(
    file: RecipeFile, target: Target, artifact: Tree | None, weight: int
) -> dict[str, Json]:
    size = artifact.size if artifact else weight
    why = "not known before the image is assembled" if artifact else "its weights do not exist yet"
    # Other kinds share the weight layers; these have the same weights as a blob of its own.
    runners = ("modelpack", "ollama") if has_gguf(target) else ("modelpack",)
    plain = [kind for kind in runners if kind in file.recipe.outputs.kinds]
    if plain:
        why += (
            f"; {' and '.join(plain)}: the weights are uploaded a second time, {human(size)}, as"
            " plain files"
        )
        why += "" if "ollama" in plain else "; modelpack-tar would upload nothing more"
    hub = file.recipe.outputs.hub
    if hub:
        why += f"; with --push, {human(size)} go to {hub} too, unless it has them"
    disk = 2 * size if plain else size
    written = disk + size if hub else disk
    return _row(
        "publish", target=target.name, cached=False, why=why, read=size, write=written, disk=disk
    )


def _state(stage: StageInputs, earlier: Mapping[str, Json] | None, tools: Tools) -> dict[str, Json]:
    """Return whether a stage's result is cached and where, and if not, which inputs changed."""
    if found := tools.store.find(stage.key):
        return {"cached": True, "why": "", "where": found.where or HERE}
    changed = stage.changed_since(earlier)
    if changed == "":
        return {"cached": False, "why": "its result was removed from the store"}
    why = changed if changed.startswith("never") else f"changed: {changed}"
    return {"cached": False, "why": why}


def _row(
    stage: str,
    *,
    cached: bool,
    why: str,
    where: str = "",
    target: str = "",
    read: int = 0,
    write: int = 0,
    memory: int = 0,
    disk: int | None = None,
) -> dict[str, Json]:
    return {
        "stage": stage,
        "target": target,
        "cached": cached,
        "where": (where or HERE) if cached else "",
        "why": why,
        "read_bytes": read,
        "write_bytes": write,
        "peak_memory_bytes": memory,
        "disk_bytes": write if disk is None else disk,
    }
