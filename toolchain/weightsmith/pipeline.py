"""The order of the stages: what `invoke build` does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

from weightsmith.ahead import Ahead
from weightsmith.build_record import StageRecord
from weightsmith.checkpoints.facts import read_facts
from weightsmith.checkpoints.gguf_names import gguf_models
from weightsmith.delivery import forms, forms_baked, on_hub, write_volume
from weightsmith.destinations import InStore
from weightsmith.errors import CacheLost, CheckFailed
from weightsmith.evaluating.results import Result, unproven_of
from weightsmith.oci.index import own_of
from weightsmith.oci.references import Reference
from weightsmith.outcome import Outcome, Timer
from weightsmith.planning.ahead import shares
from weightsmith.planning.cache_scales import has_scales
from weightsmith.planning.checks import (
    check_before_work,
    check_images,
    check_places,
    check_tags,
)
from weightsmith.planning.images import evaluation_of, image_inputs
from weightsmith.planning.options import (
    needs_files,
    quantize_options,
    sources_to_merge,
    texts_of,
    unmerged_adapters,
)
from weightsmith.planning.proving import proving
from weightsmith.planning.request import BuildRequest
from weightsmith.planning.serving import serving_config
from weightsmith.planning.sources import resolve_request
from weightsmith.planning.tasks import probes, tasks_of
from weightsmith.provenance.labels import reference as name_of
from weightsmith.provenance.materials import ImageInputs, ImageMaterials, whole_image
from weightsmith.quality.result import Quality
from weightsmith.quantizers import formats
from weightsmith.recipe_file import RecipeFile
from weightsmith.recording import Built, Record
from weightsmith.serving.plan import ServingConfig
from weightsmith.serving.projector import projector_in
from weightsmith.serving.targets import Target
from weightsmith.stages.bake import bake, with_scores
from weightsmith.stages.cache_scales import with_cache_scales
from weightsmith.stages.dequantized import can_answer, dequantized
from weightsmith.stages.evaluate import evaluate
from weightsmith.stages.merge import BUILDER as MERGE_BUILDER
from weightsmith.stages.merge import merge
from weightsmith.stages.publish import candidate, publish
from weightsmith.stages.quality import quality, quality_fault
from weightsmith.stages.quantize import quantize
from weightsmith.stages.record import is_written, layers_in
from weightsmith.stages.reference import reference
from weightsmith.stages.unmerged import base_weight_bytes, unmerged, unmerged_gguf
from weightsmith.stages.upload import may_refuse
from weightsmith.stages.validate import validate
from weightsmith.tools import Tools
from weightsmith.validating.result import Validation
from weightsmith.values import (
    LORA,
    Artifact,
    Checkpoint,
    Sources,
)

T = TypeVar("T")
Weighed = tuple[Outcome[Artifact], Outcome[Quality | None]]


def build(request: BuildRequest, tools: Tools) -> Iterator[Built]:
    """Yield each target's image: merged, quantized, planned, baked, evaluated, published.

    If a result in a shared cache cannot be read, the build starts again without it: what was
    finished is in the store.
    """
    seen: set[str] = set()
    while True:
        try:
            with Ahead[Weighed](tools) as ahead:
                for built in _build(request, tools, ahead):
                    if built.target.name not in seen:
                        seen.add(built.target.name)
                        yield built
        except CacheLost as lost:
            tools.progress.note(f"{lost.message}; it is made here instead")
        else:
            return


def _build(request: BuildRequest, tools: Tools, ahead: Ahead[Weighed]) -> Iterator[Built]:
    recipe, clock, store = request.file.recipe, Clock(tools), InStore(tools.store)
    tasks = tasks_of(request.file)
    check_machine(request, tools)
    request, sources = clock.take(resolve_request(request, tools))
    check_tags(request, sources, tools)
    check_images(request, sources, check_before_work(request, sources, tools), tools)
    merged = sources_to_merge(request.targets, sources)
    files = needs_files(request.targets)
    checkpoint = clock.take(merge(merged, recipe.merge, store, tools, files=files))
    weighing = partial(weighed, request, sources, checkpoint)
    meanwhile = tools
    if room := shares(request.file, request.targets, sources, tools):
        first = request.targets[0]
        meanwhile = ahead.start(first.name, partial(weighing, first), room)
    prover = proving(request, sources, checkpoint, meanwhile)
    validation = validated(request, merged, checkpoint, replace(clock, tools=prover))
    expected = clock.take(reference(tasks, sources, checkpoint, store, prover))
    begun = Record(request, sources, checkpoint, tools, validation)
    judge(begun, expected, clock.stages)
    for target in request.targets:
        timed = Clock(tools, dict(clock.stages))
        packed, loss = ahead.result(target.name, partial(weighing, target))
        artifact = weights = timed.take(packed)
        record = replace(begun, target=target, artifact=artifact, quality=timed.take(loss))
        judge_quality(record, expected, timed.stages)
        if has_scales(request.file, target, read_facts(checkpoint.tree.texts)):
            demanded = recipe.serve.kv_cache_scales == "calibrated"
            texts = texts_of(request.file)
            scaled = with_cache_scales(checkpoint, artifact, texts, store, tools, demanded=demanded)
            artifact = timed.take(scaled)
            record = replace(record, artifact=artifact)
        config = timed.take(rendered(request, target, sources, checkpoint, artifact, tools))
        made = timed.take(baked(record, target, artifact, config))
        record = replace(record, config=config, image=own_of(whole_image(made)))
        results = evaluated(record, weights, made[0].inputs, expected, timed)
        judge(record, results, timed.stages)
        made = with_scores(made, results, record.started, tools.store)
        name, outputs = name_of(recipe, target.name), request.outputs_of(target)
        layout = request.candidate_layout(target)
        others = forms_baked(record, made, results)
        published = timed.take(publish(made, name, outputs, tools, started_in=layout))
        if others and not record.names(published):
            # What is published is recorded, whatever happens to its other forms.
            record.keep(published, {}, results, timed.stages)
        found = forms(request, target, others, tools)
        write_volume(request, target, config, made[0].inputs, found, tools)
        if request.hub_of(target):
            record.keep(published, found, results, timed.stages)
        if uploaded := on_hub(request, target, artifact, tools):
            found = {**found, "hub": timed.take(uploaded)}
        warn_of(results, tools)
        yield record.keep(published, found, results, timed.stages)


@dataclass(slots=True)
class Clock:
    """Records how long each stage took, and whether it was cached."""

    tools: Tools
    stages: dict[str, StageRecord] = field(default_factory=dict)

    def take(self, outcome: Outcome[T]) -> T:
        """Return a stage's value, and record its time."""
        self.stages[outcome.stage] = StageRecord(cached=outcome.cached, seconds=outcome.seconds)
        return outcome.value


def check_machine(request: BuildRequest, tools: Tools) -> None:
    """Check, before any long step, that jobs can run and results can be written and pushed."""
    check_places(request)
    tools.runner.check(MERGE_BUILDER)
    for target in request.targets:
        if (place := request.hub_of(target)) and may_refuse(place, tools.hub):
            tools.progress.note(
                f"{place.reference} already holds a model: if this build makes another one, nothing"
                " is published without --force"
            )
    if request.outputs.push:
        first = request.targets[0].name
        tools.registry.check_push(Reference.parse(name_of(request.file.recipe, first)))


def validated(
    request: BuildRequest, sources: Sources, checkpoint: Checkpoint, clock: Clock
) -> Validation | None:
    """Return how the checkpoint was validated; None if nothing was merged or validation is off.

    Raises CheckFailed, and writes the report, if it differs from base and adapters.
    """
    recipe, tools = request.file.recipe, clock.tools
    if not sources.adapters:
        return None
    if not recipe.validation.enabled:
        tools.progress.warn("validation is off in the recipe: merged weights were not checked")
        return None
    items, store = probes(request.file), InStore(tools.store)
    try:
        return clock.take(validate(checkpoint, sources, recipe.merge, items, store, tools))
    except CheckFailed as error:
        found = Validation.from_json(error.details) if error.details else None
        record = Record(request, sources, checkpoint, tools, found)
        raise refusal(record, (), clock.stages, error) from None


def quantized(
    file: RecipeFile,
    target: Target,
    sources: Sources,
    checkpoint: Checkpoint,
    tools: Tools,
    *,
    beside: Sequence[Target] = (),
) -> Outcome[Artifact]:
    """Return the weights in the target's format, by the recipe's options for it.

    Formats of targets `beside` it may be made in the same pass.
    """
    store = InStore(tools.store)
    if target.format != LORA:
        formats_ = dict.fromkeys(one.format for one in (target, *beside) if one.format.packed)
        options, *others = (
            quantize_options(file, one, sources.base, tools)
            for one in dict.fromkeys([target.format, *formats_])
        )
        return quantize(checkpoint, options, store, tools, beside=others)
    if "gguf" not in target.engine.accepts:
        return Timer("quantize", LORA.name, tools).done(unmerged(sources), cached=True)
    base = Checkpoint(tree=sources.base.tree)
    options = quantize_options(file, formats()["f16"], sources.base, tools)
    return unmerged_gguf(sources, quantize(base, options, store, tools), tools)


def weighed(
    request: BuildRequest, sources: Sources, checkpoint: Checkpoint, target: Target, tools: Tools
) -> Weighed:
    """Return the weights in the target's format, and what they lost."""
    file, store = request.file, InStore(tools.store)
    made = quantized(file, target, sources, checkpoint, tools, beside=request.targets)
    limits, texts = file.recipe.quality, texts_of(file)
    return made, quality(checkpoint, made.value, texts, limits, store, tools)


def rendered(
    request: BuildRequest,
    target: Target,
    sources: Sources,
    checkpoint: Checkpoint,
    artifact: Artifact,
    tools: Tools,
) -> Outcome[ServingConfig]:
    """Plan and render for the finished artifact."""
    timer = Timer("render", target.name, tools)
    # A GGUF model is served as a file, a checkpoint as a folder.
    names = [entry.path for entry in artifact.tree.files if "/" not in entry.path]
    files = gguf_models(names)
    config = serving_config(
        request.file,
        target,
        read_facts((sources.base if target.format == LORA else checkpoint).tree.texts),
        base_weight_bytes(artifact),
        weights=files[0] if files else "",
        made_from=(artifact.digest,),
        adapters=unmerged_adapters(request.file, target, sources),
        projector=projector_in(artifact.tree),
    )
    return timer.done(config, cached=is_written(config.files, request.folder(target)))


def baked(
    record: Record, target: Target, artifact: Artifact, config: ServingConfig
) -> Outcome[tuple[ImageMaterials, ...]]:
    """Assemble the images on the base that the lock pins; they have no scores yet."""
    request, tools = record.request, record.tools
    prepare = partial(
        image_inputs,
        request,
        target,
        record.sources,
        record.checkpoint,
        artifact,
        record.quality,
        config,
        tools,
    )
    name, earlier = name_of(request.file.recipe, target.name), layers_in(request.folder(target))
    return bake(prepare, name, tools, push=request.outputs.push, earlier=earlier)


def refusal(
    record: Record,
    results: tuple[Result, ...],
    stages: Mapping[str, StageRecord],
    error: CheckFailed,
) -> CheckFailed:
    """Write the report of a failed gate, and return its error with the report's path."""
    record.tools.progress.warn(f"not published: {error.message}")
    report = record.refuse(results, stages, error.message)
    return CheckFailed(error.message, hint=f"{error.hint}\nreport: {report}", details=error.details)


def evaluated(
    record: Record,
    weights: Artifact,
    inputs: ImageInputs,
    expected: tuple[Result, ...],
    clock: Clock,
) -> tuple[Result, ...]:
    """Return the tasks with the scores of the started image, or of its weights in transformers.

    `weights` has no scales of a cache, which change no answer here.
    Raises CheckFailed, and writes the report, if it does not start or does not meet its plan, or if
    its weights are damaged.
    """
    request, target, image, tools = record.request, record.target, record.image, record.tools
    if target is None or image is None:
        raise AssertionError("there is no image to start")
    evaluation = evaluation_of(request, target, inputs, expected)
    started = candidate(image, request.candidate_layout(target), tools)
    try:
        results = clock.take(evaluate(image, evaluation, started, tools))
        if record.started or not results or not can_answer(weights.format):
            return results
        return clock.take(dequantized(record.checkpoint, weights, results, tools))
    except CheckFailed as error:
        raise refusal(record, expected, clock.stages, error) from None


def judge(record: Record, results: tuple[Result, ...], stages: Mapping[str, StageRecord]) -> None:
    """Raise CheckFailed, and write the report, if a score dropped more than the recipe allows.

    Also if a task that must be proven is not, by what is known so far.
    """
    try:
        for result in results:
            result.require()
        for result in results:
            result.require_proof(tested=record.image is not None)
    except CheckFailed as error:
        raise refusal(record, results, stages, error) from None


def warn_of(results: tuple[Result, ...], tools: Tools) -> None:
    """Warn, last of all, why what was published proves nothing."""
    for reason in unproven_of(results):
        tools.progress.warn(f"published, but not proven: {reason}")


def judge_quality(
    record: Record, results: tuple[Result, ...], stages: Mapping[str, StageRecord]
) -> None:
    """Raise CheckFailed, and write the report, if quantizing lost too much."""
    if record.artifact is None:
        raise AssertionError("there is no artifact to check")
    limits = record.request.file.recipe.quality
    if fault := quality_fault(record.artifact.format, record.quality, limits):
        raise refusal(record, results, stages, fault)
