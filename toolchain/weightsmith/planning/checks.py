"""Checks of a build that run before any long step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace

from weightsmith.build_record import read_build
from weightsmith.checkpoints.facts import ModelFacts, read_facts
from weightsmith.errors import EnvironmentFailure, InputRefused, UsageError
from weightsmith.evaluating import subjects as references
from weightsmith.evaluating.results import RecipeTask
from weightsmith.layouts import check_layout
from weightsmith.oci.image import MOST_LAYERS
from weightsmith.oci.limits import limits_of
from weightsmith.oci.ollama import check_name
from weightsmith.oci.references import Reference
from weightsmith.oci.weights import LARGEST_ANYWHERE
from weightsmith.planning.bases import bases_of
from weightsmith.planning.cache_scales import forecast_scales, missing
from weightsmith.planning.dequantized import forecast_dequantized
from weightsmith.planning.memory import (
    quality_memory,
    quantize_memory,
    reference_memory,
    require_memory,
    validate_memory,
)
from weightsmith.planning.options import (
    check_model,
    needs_files,
    quantize_options,
    sources_to_merge,
    unmerged_adapters,
    warn_of_texts,
)
from weightsmith.planning.origins import origin_of
from weightsmith.planning.request import BuildRequest
from weightsmith.planning.serving import serving_config
from weightsmith.planning.sizes import disk_peak, estimated_bytes, expected_projector
from weightsmith.planning.targets import all_targets, can_make
from weightsmith.planning.tasks import check_leaks, probes, say_samples, tasks_of
from weightsmith.ports import Runner, Silent
from weightsmith.provenance.labels import PREFIX, reference, repository
from weightsmith.quantizers import of_format
from weightsmith.recipe import Recipe
from weightsmith.serving.architectures import check_served
from weightsmith.serving.compatibility import check_support
from weightsmith.serving.memory import human
from weightsmith.serving.targets import Target
from weightsmith.stages import merge as merging
from weightsmith.stages import quantize as quantizing
from weightsmith.stages import validate as validating
from weightsmith.stages.bake import layer_limit
from weightsmith.stages.base import OWN, base_reference, check_base, check_own, data_base
from weightsmith.stages.quantize import QuantizeOptions, projector_bytes
from weightsmith.tools import Tools
from weightsmith.values import Sources, Tree


def check_before_work(request: BuildRequest, sources: Sources, tools: Tools) -> dict[str, str]:
    """Check, before any long step, what would otherwise fail later.

    Checks that the model is served, that the adapters fit the base, that each stage and the options
    fit the memory, and that the disk has room.
    Returns the planned device of each target, by the target's name.
    """
    recipe, model = request.file.recipe, read_facts(sources.base.tree.root)
    check_served(model)
    written, packed, devices = 0, 0, {}
    probes(request.file)
    if sources_to_merge(request.targets, sources).adapters:
        files = needs_files(request.targets)
        written += merging.check(sources, recipe.merge, files=files)["write_bytes"]
    elif not sources.adapters:
        tools.progress.warn("the recipe has no adapter: the base is built unchanged")
    tasks = tasks_of(request.file)
    check_leaks(request.file, tasks, tools.progress)
    say_samples(tasks, tools.progress)
    if not tasks:
        tools.progress.warn("the recipe has no `evaluate`: the image's answers are not tested")
    for target in request.targets:
        origin = origin_of(target, sources, recipe.merge)
        if target.engine.legacy:
            tools.progress.warn(target.engine.legacy)
        size = estimated_bytes(origin.weight_bytes, target.format, origin.model)
        adapters = unmerged_adapters(request.file, target, sources)
        planned = serving_config(
            request.file,
            target,
            origin.model,
            size,
            weights="",
            made_from=(),
            adapters=adapters,
            projector=expected_projector(target, origin.model),
        )
        options = quantize_options(request.file, target.format, sources.base, tools)
        devices[target.name] = device = planned.plan.device
        check_format(target, options, origin.model, device)
        if uncalibrated := missing(request.file, target, origin.model):
            tools.progress.warn(uncalibrated)
        peak = disk_peak(origin.size, target.format, origin.model, options.options)
        packed = max(packed, peak)
    if any(target.format.packed for target in request.targets):
        warn_of_texts(request.file, tools.progress)
    require_memory(_needs(request, sources, model, devices, tools), tools.memory)
    if not everything_cached(request, sources, tools):
        for target in request.targets:
            if target.format.packed:
                require_builder(target, tools.runner)
        written += _beside_scales(request, sources, model, tools)
        tools.store.require_room(written + packed, "the build")
    return devices


def _beside_scales(request: BuildRequest, sources: Sources, model: ModelFacts, tools: Tools) -> int:
    """Return the bytes of the files that are written beside the scales of caches."""
    rows = (
        forecast_scales(request.file, target, model, sources, None, tools)
        for target in request.targets
    )
    return sum(row["write"] for row in rows if row)


def _needs(
    request: BuildRequest,
    sources: Sources,
    model: ModelFacts,
    devices: Mapping[str, str],
    tools: Tools,
) -> Iterator[tuple[str, str, int]]:
    """Yield each stage whose job is still to run, its target and the bytes that it needs."""
    recipe, whole = request.file.recipe, sources_to_merge(request.targets, sources)
    checkpoint: Tree | None = sources.base.tree
    if whole.adapters:
        files = needs_files(request.targets)
        merged = merging.find(whole, recipe.merge, tools.store, files=files)
        checkpoint = merged.tree if merged else None
        if checkpoint is None:
            yield "merge", "", merging.check(whole, recipe.merge)["peak_memory_bytes"]
        if recipe.validation.enabled and not _is_validated(request, whole, checkpoint, tools):
            yield "validate", "", validate_memory(model, whole)
    tasks = tasks_of(request.file)
    asked = [task for task in tasks if not _is_answered(task, sources, tools)]
    if asked:
        yield "reference", "", reference_memory(model, sources, asked, tools.memory)
    for target in request.targets:
        row = forecast_scales(request.file, target, model, sources, checkpoint, tools)
        if row and not row["cached"]:
            yield "cache-scales", target.name, row["memory"]
        if not target.format.packed:
            continue
        options = quantize_options(request.file, target.format, sources.base, tools)
        key = quantizing.inputs(checkpoint.digest, options).key if checkpoint else None
        made = tools.store.find(key) if key else None
        if not made:
            origin = origin_of(target, sources, recipe.merge)
            needed = quantize_memory(origin.model, origin.size, options)
            yield "quantize", target.name, needed
        if recipe.quality.gate is not False:
            yield "quality", target.name, quality_memory(model, recipe.quality.tokens)
        pair, given = (checkpoint, made.tree if made else None), (tasks, model)
        row = forecast_dequantized(request.file, target, devices[target.name], *given, pair, tools)
        if row and not row["cached"]:
            yield "dequantized", target.name, row["memory"]


def _is_validated(
    request: BuildRequest, sources: Sources, checkpoint: Tree | None, tools: Tools
) -> bool:
    if checkpoint is None:
        return False
    asked = probes(request.file)
    stage = validating.inputs(sources, request.file.recipe.merge, checkpoint.digest, asked)
    return tools.store.find(stage.key) is not None


def _is_answered(task: RecipeTask, sources: Sources, tools: Tools) -> bool:
    """Return whether base and adapters have answered a task; the merged model may still have to."""
    asked = references.subjects(sources, task.adapter).values()
    keys = [references.inputs(subject, task.task).key for subject in asked]
    return all(tools.store.find(key) for key in keys)


def require_builder(target: Target, runner: Runner) -> None:
    """Raise EnvironmentFailure if the target's builder cannot be made; suggest one that can."""
    try:
        runner.check(of_format(target.format.name).builder)
    except EnvironmentFailure as lacking:
        hint = lacking.hint
        for name, other in all_targets().items():
            same_kind = other.format.kind == target.format.kind  # made by another quantizer
            if same_kind and other.engine.name == target.engine.name:
                with suppress(EnvironmentFailure):
                    runner.check(of_format(other.format.name).builder)
                    hint += f"; the target {name} can be built here"
                    break
        raise EnvironmentFailure(lacking.message, hint=hint) from lacking


def check_format(target: Target, options: QuantizeOptions, model: ModelFacts, device: str) -> None:
    """Raise InputRefused for a format that the engine cannot load, or that cannot be made.

    Uses only the table of what engines load and the model's facts.
    """
    check_support(target.engine, target.format, device, model)
    if target.format.packed and can_make(target.format):
        check_model(options, model)


def everything_cached(request: BuildRequest, sources: Sources, tools: Tools) -> bool:
    """Return whether merging and quantizing are already done."""
    sources, files = sources_to_merge(request.targets, sources), needs_files(request.targets)
    merged = merging.find(sources, request.file.recipe.merge, tools.store, files=files)
    checkpoint = merged.tree if merged else (None if sources.adapters else sources.base.tree)
    return checkpoint is not None and all(
        not target.format.packed
        or tools.store.find(
            quantizing.inputs(
                checkpoint.digest,
                quantize_options(request.file, target.format, sources.base, tools),
            ).key
        )
        for target in request.targets
    )


def check_places(request: BuildRequest) -> None:
    """Raise UsageError for names and folders that nothing can be published to.

    Reads no source and asks no registry.
    """
    check_image_names(request.file.recipe)
    for target in request.targets:
        check_layout(request.outputs_of(target).layout)
        for kind in request.forms_of(target):
            check_layout(request.outputs_of_form(target, kind).layout)
            if kind == "ollama":
                check_name(Reference.parse(f"{reference(request.file.recipe, target.name)}-{kind}"))
        request.hub_of(target)


def check_image_names(recipe: Recipe) -> None:
    """Raise UsageError for a repository that is none, and for labels that only we set."""
    repository_of(recipe)
    if own := [name for name in recipe.image.labels if name.startswith(PREFIX)]:
        raise UsageError(
            f"image.labels sets {own[0]}, which only the build itself may set",
            hint="choose another name, such as com.example.team",
        )


def repository_of(recipe: Recipe) -> Reference:
    """Return the recipe's repository; UsageError for none, or one with a tag or a digest."""
    name = repository(recipe)
    place = Reference.parse(name)
    if place.digest or ":" in name.rpartition("/")[2]:
        raise UsageError(
            f"image.repository {name} must not have a tag or a digest",
            hint="write REGISTRY/NAME alone: the tag is VERSION-TARGET",
        )
    return place


def check_layer_sizes(request: BuildRequest, sources: Sources) -> None:
    """Raise UsageError for a weight file that is too large for a layer, by its estimated size.

    The image's actual sizes are checked again before it is pushed.
    """
    recipe, tree = request.file.recipe, sources.base.tree
    own = layer_limit(recipe.image.max_layer_size)
    limits = limits_of(repository_of(recipe).registry)
    theirs = limits.largest_layer if limits and request.outputs.push else 0
    for target in request.targets:
        if target.format.suffix == ".gguf":
            origin = origin_of(target, sources, recipe.merge)
            beside = projector_bytes(origin.model)
            size = estimated_bytes(origin.weight_bytes, target.format, origin.model) - beside
            size = max(size, beside)
            most, key = min(filter(None, (own, theirs)), default=0), "quantize.split_max_size"
            fits = bool(recipe.quantize.split_max_size)
        else:
            size = max((file.size for file in tree.files), default=0)
            most, key, fits = theirs, "image.max_layer_size", own != 0 or target.format.packed
        if most and size > most and not fits:
            raise UsageError(
                f"{target.name}: a file of about {human(size)} would be one layer, and the limit "
                f"for a layer is {human(most)}",
                hint=f"set {key} in the recipe to split the file",
            )


def check_layer_count(request: BuildRequest, sources: Sources) -> None:
    """Raise UsageError for weights that no engine takes in layers that every registry accepts.

    By their estimated size, hours before the image would be refused for its layers.
    """
    recipe = request.file.recipe
    if layer_limit(recipe.image.max_layer_size) is not None:
        return
    for target in request.targets:
        origin = origin_of(target, sources, recipe.merge)
        size = estimated_bytes(origin.weight_bytes, target.format, origin.model)
        layers = -(-size // LARGEST_ANYWHERE)
        if target.format.suffix != ".gguf" and layers > MOST_LAYERS - 2:
            raise UsageError(
                f"{target.name}: weights of about {human(size)} would be {layers} layers or more,"
                f" and engines support at most {MOST_LAYERS} layers in an image",
                hint="set image.max_layer_size to a larger size, such as 40GB, and push to a"
                " registry that accepts such layers",
            )


def check_tags(request: BuildRequest, sources: Sources, tools: Tools) -> None:
    """Raise UsageError, before any long step, if a tag to push names an image of other sources.

    The digests are compared before anything is published; here, labels show what will differ.
    """
    recipe = request.file.recipe
    if not request.outputs.push or request.outputs.force:
        return
    expected = {f"{PREFIX}base.digest": str(sources.base.digest)} | {
        f"{PREFIX}adapter.{number}.digest": str(adapter.snapshot.digest)
        for number, adapter in enumerate(sources.adapters)
    }
    for target in request.targets:
        name, ours = reference(recipe, target.name), _pushed_before(request, target, sources)
        for tag in (name, *(f"{name}-{kind}" for kind in request.forms_of(target))):
            place, labels = Reference.parse(tag), {}
            found = tools.registry.confirmed(place)
            if found is None or found in ours:
                continue
            try:
                labels = dict(tools.registry.pull(place).labels)
            except UsageError:  # an index without this machine's platform
                continue
            except InputRefused:
                labels = {}
            wanted = {**expected, f"{PREFIX}target": target.name, **recipe.image.labels}
            if any(labels.get(key) != wanted[key] for key in (*expected, f"{PREFIX}target")):
                raise UsageError(
                    f"{tag} already names an image of other sources",
                    hint="raise `version` in the recipe, or move the tag with --force",
                )


def _pushed_before(request: BuildRequest, target: Target, sources: Sources) -> set[str]:
    """Return the digests of the images that the last build of these sources has recorded."""
    try:
        record = read_build(request.folder(target))
    except (OSError, ValueError):
        return set()
    digests = [record.base.digest, *(adapter.digest for adapter in record.adapters)]
    if digests != [sources.base.digest, *(a.snapshot.digest for a in sources.adapters)]:
        return set()
    return {str(one.digest) for one in (record.image, *record.forms.values()) if one}


def check_assembly(
    request: BuildRequest, sources: Sources, devices: Mapping[str, str], tools: Tools
) -> None:
    """Check, without a network, that each image can be assembled of its layers and its base.

    `devices` maps target names to planned devices. Raises UsageError for layers that are too large
    or too many, and what `check_base` raises.
    """
    check_layer_sizes(request, sources)
    check_layer_count(request, sources)
    settings = request.file.recipe.image
    for target in request.targets:
        base = base_reference(target.engine, devices[target.name], settings.base)
        check_base(base, target.engine.name, tools, platforms=settings.platforms)
        for kind in request.forms_of(target):
            check_own(data_base(kind, ""), settings.platforms)


def check_images(
    request: BuildRequest,
    sources: Sources,
    devices: Mapping[str, str],
    tools: Tools,
) -> None:
    """Check, before any long step, that each image can be assembled.

    Also that its base can be reached and has every platform. Raises what `check_assembly` and
    `bases_of` raise. Bases that are assembled on this machine are assembled later, when they are
    needed.
    """
    check_assembly(request, sources, devices, tools)
    for target in () if everything_cached(request, sources, tools) else request.targets:
        device = devices[target.name]
        chosen = base_reference(target.engine, device, request.file.recipe.image.base)
        if not chosen.startswith(OWN):
            # Its warnings are shown later, when the image is assembled.
            bases_of(request, target, device, replace(tools, progress=Silent()))
