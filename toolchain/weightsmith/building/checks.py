"""Checks of a build that run before any long step."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace

from weightsmith.building.graph import disk_needed
from weightsmith.building.pipeline import BuildSteps
from weightsmith.building.request import BuildRequest
from weightsmith.building.targets import all_targets
from weightsmith.core.errors import EnvironmentFailure, InputRefused, UsageError
from weightsmith.core.ports import Runner, Silent
from weightsmith.core.values import Sources
from weightsmith.evaluating.build_record import read_build
from weightsmith.evaluating.pictures import UNPREPARED
from weightsmith.evaluating.results import named, say_samples
from weightsmith.evaluating.task import check_program
from weightsmith.models.templates import own_template, takes_parts
from weightsmith.oci.image import MOST_LAYERS
from weightsmith.oci.limits import limits_of
from weightsmith.oci.modelpack import check_name
from weightsmith.oci.references import Reference
from weightsmith.oci.weights import LARGEST_ANYWHERE
from weightsmith.provenance.labels import PREFIX, reference, repository
from weightsmith.quantizers import legacy_of, of_format
from weightsmith.quantizers.architectures import has_projector
from weightsmith.quantizers.calibration import texts_of
from weightsmith.quantizers.gguf_settings import other_scale
from weightsmith.quantizers.quality.limits import ANY_FORMAT
from weightsmith.quantizers.quantizer import Quantizer
from weightsmith.recipe.schema import ADAPTER, Recipe
from weightsmith.serving.devices import is_cpu
from weightsmith.serving.memory import human
from weightsmith.serving.targets import Target
from weightsmith.stages.bake import layer_limit
from weightsmith.stages.upload import may_refuse
from weightsmith.steps.bases import (
    OWN,
    base_reference,
    bases_of,
    check_base,
    check_own,
    data_base,
)
from weightsmith.steps.healthcheck import has_program, healthcheck_layers, reads_weights
from weightsmith.steps.outputs import check_layout
from weightsmith.steps.sizes import projector_bytes
from weightsmith.steps.step import Foresight
from weightsmith.steps.thin import THIN
from weightsmith.steps.tools import Tools

_NO_TEMPLATE = "model has no chat template in chat_template.jinja or tokenizer_config.json"


def check_machine(request: BuildRequest, steps: BuildSteps, tools: Tools) -> None:
    """Check, before any long step, that jobs can run and results can be pushed."""
    for builder in steps.checkpoint.builders():
        tools.runner.check(builder)
    for target in request.targets:
        if (place := request.hub_of(target)) and may_refuse(place, tools.hub):
            tools.progress.note(
                f"{place.reference} already holds a model: if this build makes another one, nothing"
                " is published without --force"
            )
    if (hub := request.file.recipe.outputs.hub) and not request.outputs.push:
        tools.progress.note(f"outputs.hub: nothing goes to {hub} without --push")
    if request.outputs.push:
        first = request.targets[0].name
        tools.registry.check_push(Reference.parse(reference(request.file.recipe, first)))


def check_before_work(request: BuildRequest, steps: BuildSteps, seen: Foresight) -> None:
    """Check, before any long step, that each step fits the memory and all of them the disk.

    Warns of what the build will not show.
    """
    file, sources, tools = request.file, seen[steps.sources], seen.tools
    check_suites(request, steps, seen)
    warn_of_answers(request, steps, seen)
    if not sources.adapters:
        tools.progress.warn("the recipe has no adapter: the base is built unchanged")
    say_samples(steps.tasks, tools.progress)
    if not steps.tasks:
        tools.progress.warn("the recipe has no `evaluate`: the image's answers are not tested")
    for target in request.targets:
        for legacy in filter(None, (target.engine.legacy, legacy_of(target.format))):
            tools.progress.warn(f"{target.name} is {legacy}")
    if any(target.format.without_adapters.packed for target in request.targets):
        # The texts are read now, and a user is told if they are general or few.
        texts = texts_of(file)
        if file.recipe.calibration is None:
            count = len(texts.calibration) + len(texts.held_out)
            tools.progress.warn(
                f"the recipe has no `calibration`: {count} general texts are used (never the "
                "evaluation questions: calibrating on them would hide losses on other text)"
            )
        elif texts.warning():
            tools.progress.warn(texts.warning())
    require_memory(steps, seen)
    if not everything_cached(steps, seen):
        for target in request.targets:
            if target.format.without_adapters.packed:
                require_builder(target, tools.runner)
        stored = [step for step in steps if not step.publishes]
        tools.store.require_room(disk_needed(stored, seen), "the build")


def _check_limits(names: Iterable[str]) -> None:
    """Raise UsageError for limits of a format that there is not: they would hold for none."""
    for name in names:
        if name == ANY_FORMAT:
            continue
        try:
            of_format(name.removesuffix("-lora"))
        except UsageError as error:
            raise UsageError(f"quality.limits.{name}: {error.message}", hint=error.hint) from None


def check_suites(request: BuildRequest, steps: BuildSteps, seen: Foresight) -> None:
    """Raise EnvironmentFailure for a missing judge, InputRefused for pictures that are not seen."""
    for one in steps.tasks:
        check_program(one.task)
    check_lengths(steps, seen)
    check_pictures(request, steps, seen)


def warn_of_answers(request: BuildRequest, steps: BuildSteps, seen: Foresight) -> None:
    """Warn of a target whose engine computes the model in another way."""
    if why := other_scale(seen[steps.checkpoint].model):
        for target in request.targets:
            if "gguf" in target.engine.accepts:
                seen.tools.progress.warn(f"{target.name}: {why}; choose target vllm")


def check_lengths(steps: BuildSteps, seen: Foresight) -> None:
    """Raise UsageError for answers that would leave a server no room for the question."""
    for target in steps.targets:
        most = seen[target.config].max_model_len
        for one in steps.tasks:
            writes = one.task.metric != "choice" and not one.task.pooled
            if writes and one.task.max_tokens >= most:
                asked = f"max_tokens {one.task.max_tokens} of an answer leaves no room for"
                raise UsageError(
                    named(one, f"{asked} its question: {target.of.target.name} has {most} tokens"),
                    hint="raise serve.max_model_len, or lower evaluate.max_tokens",
                )


def check_pictures(request: BuildRequest, steps: BuildSteps, seen: Foresight) -> None:
    """Raise InputRefused for questions with pictures that the model or an image cannot see."""
    tasks = [one for one in steps.tasks if one.task.pictures]
    if not tasks:
        return
    first = tasks[0].task.pictures[0].name
    what = named(tasks[0], f"a question has the picture {first}")
    sources, model = seen[steps.sources], seen[steps.checkpoint].model
    voices = [sources.base, *(one.snapshot for one in sources.adapters)]
    template = next(filter(None, (own_template(one.tree.texts) for one in reversed(voices))), "")
    if not model.sees_images:
        why = f"{model.architecture or 'the model'} reads text only: config.json has no vision part"
    elif not model.describes_images:
        why = "the model has no preprocessor_config.json, which says how pictures are prepared"
    elif model.architecture in UNPREPARED:
        why = f"the builder lacks a package that prepares pictures for {model.architecture}"
    elif not takes_parts(template):
        why = f"the {'chat template is for text alone' if template else _NO_TEMPLATE}"
    else:
        why = ""
    if why:
        raise InputRefused(
            f"{what}, and {why}",
            hint="take a model that reads pictures, with all of its files, or remove these"
            " questions from `evaluate`",
        )
    kinds = {one.kind: one for task in tasks for one in task.task.pictures}
    for target in request.targets:
        if "gguf" in target.engine.accepts and not has_projector(model):
            raise InputRefused(
                f"{what}, and {target.name} would read text only: the pinned llama.cpp has no"
                f" projector for {model.vision_architecture}",
                hint="choose another target, such as vllm, or remove these questions",
            )
        for kind, one in kinds.items():
            if kind not in target.engine.pictures:
                raise InputRefused(
                    f"{one.name} is a {kind.upper()} file, which {target.engine.title} does not"
                    f" read ({target.name})",
                    hint=f"save it as {' or '.join(map(str.upper, target.engine.pictures))}",
                )


def require_memory(steps: BuildSteps, seen: Foresight) -> None:
    """Raise EnvironmentFailure for the step that needs most memory, if it is too much.

    Compares with what is allowed or free, not with the half that jobs choose to fill.
    """
    memory = seen.tools.memory
    needs = [
        (row.peak_memory_bytes, step, row)
        for step in steps
        for row in seen.rows(step)
        if not row.cached
    ]
    needed, step, row = max(needs, key=lambda need: need[0], default=(0, None, None))
    if step and row and memory.limit and needed > memory.limit:
        name = f"{row.stage} {row.target}".strip()
        also = f", or {step.way_out}" if step.way_out else ""
        raise EnvironmentFailure(
            f"{name} needs {human(needed)} of memory, and a job may use {human(memory.limit)}",
            hint="raise --memory if it was given, close other programs, build on a machine with "
            f"more memory{also}; `plan` shows what each stage needs",
        )


def everything_cached(steps: BuildSteps, seen: Foresight) -> bool:
    """Return whether merging and quantizing are already done."""
    rows = [row for step in steps if step.builders() for row in seen.rows(step)]
    return all(row.cached for row in rows)


def require_builder(target: Target, runner: Runner) -> None:
    """Raise EnvironmentFailure if the target's builder cannot be made; suggest one that can."""
    try:
        runner.check(_quantizer_of(target).builder)
    except EnvironmentFailure as lacking:
        hint = lacking.hint
        for name, other in all_targets().items():
            if _alike(other, target):  # made by another quantizer
                with suppress(EnvironmentFailure):
                    runner.check(_quantizer_of(other).builder)
                    hint += f"; the target {name} can be built here"
                    break
        raise EnvironmentFailure(lacking.message, hint=hint) from lacking


def _quantizer_of(target: Target) -> Quantizer:
    return of_format(target.format.without_adapters.name)


def _alike(one: Target, other: Target) -> bool:
    return one.engine.name == other.engine.name and (
        one.format.without_adapters.kind,
        one.format.unmerged,
    ) == (other.format.without_adapters.kind, other.format.unmerged)


def check_places(request: BuildRequest) -> None:
    """Raise UsageError for names, labels and folders that nothing can be published to.

    Also for limits of no format. Reads no source and asks no registry.
    """
    recipe = request.file.recipe
    repository_of(recipe)
    _check_limits(recipe.quality.limits)
    if recipe.outputs.mount_base and THIN not in recipe.outputs.kinds:
        raise UsageError(
            "outputs.mount_base is for thin images, and outputs.kinds has none",
            hint="add the kind thin, or leave mount_base out",
        )
    if own := [name for name in recipe.image.labels if name.startswith(PREFIX)]:
        raise UsageError(
            f"image.labels sets {own[0]}, which only the build itself may set",
            hint="choose another name, such as com.example.team",
        )
    for target in request.targets:
        check_layout(request.outputs_of(target).layout)
        for kind in request.forms_of(target):
            check_layout(request.outputs_of_form(target, kind).layout)
            if kind == "ollama":
                check_name(Reference.parse(f"{reference(recipe, target.name)}-{kind}"))
        request.hub_of(target)


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


def check_layer_sizes(request: BuildRequest, steps: BuildSteps, seen: Foresight) -> None:
    """Raise UsageError for weights that do not fit layers, by their estimated size.

    For a file that is too large for one, and for more layers than an engine takes in sizes that
    every registry accepts. The image's actual sizes are checked again before it is pushed.
    """
    recipe, tree = request.file.recipe, seen[steps.sources].base.tree
    own_limit = layer_limit(recipe.image.max_layer_size)
    limits = limits_of(repository_of(recipe).registry)
    registry_limit = limits.largest_layer if limits and request.outputs.push else 0
    for one in steps.targets:
        target, weights = one.of.target, seen[one.weights]
        if target.format.suffix == ".gguf":
            projector = projector_bytes(weights.model)
            size = max(weights.weight_bytes - projector, projector)
            most = min(filter(None, (own_limit, registry_limit)), default=0)
            key, quantize = "quantize.split_max_size", recipe.quantize
            fits = bool(quantize.split_max_size) or quantize.shared_layers
        else:
            size = max((file.size for file in tree.files), default=0)
            most, key = registry_limit, "image.max_layer_size"
            fits = own_limit != 0 or target.format.without_adapters.packed
        if most and size > most and not fits:
            raise UsageError(
                f"{target.name}: a file of about {human(size)} would be one layer, and the limit "
                f"for a layer is {human(most)}",
                hint=f"set {key} in the recipe to split the file",
            )
        layers = -(-weights.weight_bytes // LARGEST_ANYWHERE)
        if own_limit is None and target.format.suffix != ".gguf" and layers > MOST_LAYERS - 2:
            raise UsageError(
                f"{target.name}: weights of about {human(weights.weight_bytes)} would be {layers} "
                f"layers or more, and engines support at most {MOST_LAYERS} layers in an image",
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
            known = [*expected, f"{PREFIX}target"]
            if tag.startswith(f"{name}-{ADAPTER}-"):  # one of several has its own digest alone
                known = [key for key in known if f"{PREFIX}adapter." not in key]
            if any(labels.get(key) != wanted[key] for key in known):
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


def check_assembly(request: BuildRequest, steps: BuildSteps, seen: Foresight) -> None:
    """Check, without a network, that each image can be assembled of its layers and its base.

    Raises UsageError for layers that are too large or too many, and what `check_base` raises.
    """
    check_layer_sizes(request, steps, seen)
    settings = request.file.recipe.image
    for one in steps.targets:
        target = one.of.target
        base = base_reference(target.engine, seen[one.config].device, settings.base)
        check_base(base, target.engine.name, seen.tools, platforms=settings.platforms)
        for kind in request.forms_of(target):
            check_own(data_base(kind, ""), settings.platforms)


def check_images(request: BuildRequest, steps: BuildSteps, seen: Foresight) -> None:
    """Check, before any long step, that each image can be assembled.

    Also that its base can be reached and has every platform. Raises what `check_assembly` and
    `bases_of` raise. Bases that are assembled on this machine are assembled later, when they are
    needed; the health check, which takes a minute once, is compiled now.
    """
    check_assembly(request, steps, seen)
    for one in () if everything_cached(steps, seen) else steps.targets:
        target, device = one.of.target, seen[one.config].device
        chosen = base_reference(target.engine, device, request.file.recipe.image.base)
        platforms: Iterable[str] = seen[one.image]
        if not chosen.startswith(OWN):
            # Its warnings are shown later, when the image is assembled.
            quiet, again = replace(seen.tools, progress=Silent()), request.update_lock
            _, bases = bases_of(request.file, target, device, quiet, update_lock=again)
            platforms = [base.platform for base in bases]
        if has_program(request.file.recipe, seen[steps.checkpoint].model, device):
            optional = not is_cpu(device)
            healthcheck_layers(
                target.engine,
                platforms,
                seen.tools,
                optional=optional,
                whole_weights=reads_weights(request.file.recipe),
            )
