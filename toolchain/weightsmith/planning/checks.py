"""What a build refuses before anything long starts."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace

from weightsmith.checkpoints.facts import ModelFacts, read_facts
from weightsmith.errors import EnvironmentFailure, UsageError
from weightsmith.oci.limits import limits_of
from weightsmith.oci.references import Reference
from weightsmith.planning.bases import bases_of
from weightsmith.planning.options import (
    check_model,
    quantize_options,
    sources_to_merge,
    unmerged_adapters,
    warn_of_texts,
)
from weightsmith.planning.request import BuildRequest
from weightsmith.planning.serving import serving_config
from weightsmith.planning.sizes import disk_peak, estimated_bytes
from weightsmith.planning.targets import all_targets, can_make
from weightsmith.planning.tasks import check_leaks, probes, tasks_of
from weightsmith.ports import Runner, Silent
from weightsmith.provenance.labels import repository
from weightsmith.quantizers import of_format
from weightsmith.serving.compatibility import check_engine_image, check_support
from weightsmith.serving.memory import human, parse_size
from weightsmith.serving.targets import Target
from weightsmith.stages import merge as merging
from weightsmith.stages import quantize as quantizing
from weightsmith.stages.base import OWN, base_reference
from weightsmith.stages.quantize import QuantizeOptions
from weightsmith.tools import Tools
from weightsmith.values import Sources


def check_before_work(request: BuildRequest, sources: Sources, tools: Tools) -> dict[str, str]:
    """Refuse, before anything long starts, what would be refused after it.

    Adapters that do not fit the base, options that do not fit the memory, too small a disk. Returns
    the device that each target is planned for, by its name.
    """
    recipe = request.file.recipe
    written, devices = 0, {}
    probes(request.file)
    if sources_to_merge(request.targets, sources).adapters:
        written += merging.check(sources, recipe.merge)["write_bytes"]
    elif not sources.adapters:
        tools.progress.warn("the recipe has no adapter: the base is built as it is")
    tasks = tasks_of(request.file)
    check_leaks(request.file, tasks, tools.progress)
    if not tasks:
        tools.progress.warn("the recipe has no `evaluate`: nothing proves what the image knows")
    tree, model = sources.base.tree, read_facts(sources.base.tree.root)
    for target in request.targets:
        if target.engine.legacy:
            tools.progress.warn(target.engine.legacy)
        size = estimated_bytes(tree.weight_bytes, target.format, model)
        adapters = unmerged_adapters(request.file, target, sources)
        planned = serving_config(
            request.file, target, model, size, weights="", made_from=(), adapters=adapters
        )
        wanted = quantize_options(request.file, target.format, sources.base, tools)
        devices[target.name] = device = planned.plan.device
        check_format(target, wanted, model, device)
        if not recipe.image.base:
            check_engine_image(target.engine, device, model)
    if any(target.format.packed for target in request.targets):
        warn_of_texts(request.file, tools.progress)
    if not everything_cached(request, sources, tools):
        for target in request.targets:
            if target.format.packed:
                require_builder(target, tools.runner)
        written += max(disk_peak(tree.size, target.format, model) for target in request.targets)
        tools.store.require_room(written, "the build")
    return devices


def require_builder(target: Target, runner: Runner) -> None:
    """Raise EnvironmentFailure where the target's builder cannot be made; name one that can."""
    try:
        runner.check(of_format(target.format.name).builder)
    except EnvironmentFailure as lacking:
        hint = lacking.hint
        for name, other in all_targets().items():
            if name.startswith(f"{target.name}-"):  # the same weights by other hands
                with suppress(EnvironmentFailure):
                    runner.check(of_format(other.format.name).builder)
                    hint += f"; the target {name} needs none"
                    break
        raise EnvironmentFailure(lacking.message, hint=hint) from lacking


def check_format(target: Target, wanted: QuantizeOptions, model: ModelFacts, device: str) -> None:
    """Raise InputRefused for a format that the engine cannot load there, or nobody makes of it.

    By the table of what engines load and the model's facts alone.
    """
    check_support(target.engine, target.format, device)
    if target.format.packed and can_make(target.format):
        check_model(wanted, model)


def everything_cached(request: BuildRequest, sources: Sources, tools: Tools) -> bool:
    """Say whether merging and quantizing are done already."""
    sources = sources_to_merge(request.targets, sources)
    merged = tools.store.find(merging.inputs(sources, request.file.recipe.merge).key)
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


def check_layer_sizes(request: BuildRequest, sources: Sources) -> None:
    """Refuse, before the work, weights that will not fit a layer, as far as that can be told.

    Raises UsageError. What is pushed in the end is checked by its true sizes.
    """
    recipe, tree = request.file.recipe, sources.base.tree
    own = parse_size(recipe.image.max_layer_size) if recipe.image.max_layer_size else 0
    limits = limits_of(Reference.parse(repository(recipe)).registry)
    theirs = limits.largest_layer if limits and request.outputs.push else 0
    for target in request.targets:
        if target.format.suffix == ".gguf":
            size = estimated_bytes(tree.weight_bytes, target.format, read_facts(tree.root))
            most, key = min(filter(None, (own, theirs)), default=0), "quantize.split_max_size"
            fits = bool(recipe.quantize.split_max_size)
        else:
            size = max((file.size for file in tree.files), default=0)
            most, key, fits = theirs, "image.max_layer_size", bool(own) or target.format.packed
        if most and size > most and not fits:
            raise UsageError(
                f"{target.name}: a file of about {human(size)} is one layer, and a layer may have "
                f"{human(most)} at most",
                hint=f"set {key} in the recipe, to split it",
            )


def check_images(
    request: BuildRequest,
    sources: Sources,
    devices: Mapping[str, str],
    tools: Tools,
) -> None:
    """Notice before the work that an image could not be put together.

    For a layer that cannot be small enough, a base out of reach, or one not there for a platform.
    `devices` says by the target's name what each is planned for. Raises as `bases_of` does; what
    is assembled on this machine is assembled when it is needed.
    """
    check_layer_sizes(request, sources)
    for target in () if everything_cached(request, sources, tools) else request.targets:
        device = devices[target.name]
        chosen = base_reference(target.engine, device, request.file.recipe.image.base)
        if not chosen.startswith(OWN):
            # What it warns of is said when the image is put together.
            bases_of(request, target, device, replace(tools, progress=Silent()))
