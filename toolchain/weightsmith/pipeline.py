"""The order of the stages: what `invoke build` does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from weightsmith.building.artifacts import quality_fault, with_quality
from weightsmith.building.baking import Baking
from weightsmith.building.proving import Result, ask_references, with_image
from weightsmith.building.recording import Built, Record, main_scores
from weightsmith.errors import CheckFailed
from weightsmith.oci.image import Image
from weightsmith.oci.index import is_own, own_of
from weightsmith.oci.references import Reference
from weightsmith.planning.checks import check_before_work, check_images
from weightsmith.planning.options import sources_to_merge, unmerged_adapters, wanted_of
from weightsmith.planning.request import BuildRequest
from weightsmith.planning.serving import serving_config
from weightsmith.planning.tasks import probes, tasks_of
from weightsmith.provenance.labels import reference
from weightsmith.quantizers import formats
from weightsmith.recipe_file import RecipeFile
from weightsmith.serving.targets import Target
from weightsmith.stages import merge as merging
from weightsmith.stages import publish as publishing
from weightsmith.stages import quantize as quantizing
from weightsmith.stages import validate as validating
from weightsmith.stages.attest import evidence
from weightsmith.stages.lock import pinned, read_lock, with_sources, write_lock
from weightsmith.stages.record import has_layers, is_written
from weightsmith.stages.resolve import known, resolve
from weightsmith.stages.trial import ask, is_proven, known_answers
from weightsmith.stages.unmerged import unmerged, unmerged_gguf
from weightsmith.tools import Tools
from weightsmith.values import (
    LORA,
    Artifact,
    Checkpoint,
    Json,
    Published,
    Score,
    ServingConfig,
    Sources,
)


def build(request: BuildRequest, tools: Tools) -> Iterator[Built]:
    """Yield each target's image: merged, quantized, planned, baked, proven, published."""
    recipe, clock = request.file.recipe, Clock(tools)
    tasks = tasks_of(request.file)
    asked = f"{sum(len(tried.task.items) for tried in tasks)} questions to"
    check_machine(request, tools)
    with clock.stage("resolve", recipe.base.source) as note:
        request, sources = resolved(request, tools, note)
        devices = check_before_work(request, sources, tools)
        check_images(request, sources, devices, tools)
        merged = sources_to_merge(request.targets, sources)
    with clock.stage("merge", f"{len(merged.adapters)} adapter(s), {recipe.merge.method}") as note:
        checkpoint = merging.merge(merged, recipe.merge, tools)
        note["cached"] = checkpoint.details.get("cached", True)
    with clock.stage("validate", "merged weights against base and adapters") as note:
        checkpoint = validated(request, merged, checkpoint, tools, note)
    with clock.stage("reference", f"{asked} base, adapter and merged model") as note:
        expected = ask_references(tasks, sources, checkpoint, tools, note)
    judge(Record(request, sources, checkpoint, tools), expected, clock.stages)
    for target in request.targets:
        timed = Clock(tools, dict(clock.stages))
        with timed.stage("quantize", target.format.name) as note:
            artifact = quantized(request.file, target, sources, checkpoint, tools, note)
        with timed.stage("quality", target.format.name) as note:
            artifact = measured(request.file, checkpoint, artifact, tools, note)
        record = Record(request, sources, checkpoint, tools, target, artifact)
        judge_quality(record, expected, timed.stages)
        with timed.stage("render", target.name) as note:
            config = config_of(request, target, sources, checkpoint, artifact, note)
        with timed.stage("bake", reference(recipe, target.name)) as note:
            baking = Baking.of(request, target, sources, artifact, config, tools)
            image = baking.own({})
            note["cached"] = has_layers(image, request.folder(target))
        record = replace(record, baking=baking, image=image)
        with timed.stage("evaluate", f"{asked} the started image") as note:
            results = prove(baking, image, expected, record, timed, note)
        judge(record, results, timed.stages)
        with timed.stage("publish", reference(recipe, target.name)) as note:
            published = deliver(baking, checkpoint, main_scores(results), note)
        yield record.keep(published, results, timed.stages)


@dataclass(slots=True)
class Clock:
    """Tells the user what runs, and keeps how long it took and whether it was cached."""

    tools: Tools
    stages: dict[str, dict[str, Json]] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str, detail: str = "") -> Iterator[dict[str, Json]]:
        """Time a stage; its body sets `cached` where it fetched, made, changed and sent nothing."""
        note: dict[str, Json] = {"cached": False, "seconds": 0.0}
        self.tools.progress.stage(name, detail)
        began = self.tools.clock()
        yield note
        note["seconds"] = round(self.tools.clock() - began, 3)
        self.stages[name] = note
        self.tools.progress.finish(name, float(note["seconds"]), bool(note["cached"]))


def resolved(
    request: BuildRequest, tools: Tools, note: dict[str, Json]
) -> tuple[BuildRequest, Sources]:
    """Bring the sources as the lock beside the recipe pins them; keep what it did not know."""
    lock = read_lock(request.file)
    file = request.file if request.update_lock else pinned(request.file, lock)
    note["cached"] = known(file, tools)[0] is not None
    sources = resolve(file, tools)
    now = with_sources(
        lock,
        file,
        sources,
        progress=tools.progress,
        locked=request.locked,
        update=request.update_lock,
    )
    write_lock(lock, now, tools.progress)
    return replace(request, file=file), sources


def check_machine(request: BuildRequest, tools: Tools) -> None:
    """Notice before the work that jobs could not be run, or their results written or pushed."""
    tools.runner.check(merging.BUILDER)
    for target in request.targets:
        publishing.check_layout(request.outputs_of(target))
    if request.outputs.push:
        first = request.targets[0].name
        tools.registry.check_push(Reference.parse(reference(request.file.recipe, first)))


def config_of(
    request: BuildRequest,
    target: Target,
    sources: Sources,
    checkpoint: Checkpoint,
    artifact: Artifact,
    note: dict[str, Json],
) -> ServingConfig:
    """Plan and render for the artifact as it came out."""
    # A GGUF is served as a file, a checkpoint as the folder that it is.
    names = [entry.path for entry in artifact.tree.files]
    files = [name for name in names if name.endswith(".gguf") and "/" not in name]
    config = serving_config(
        request.file,
        target,
        sources.base.tree if target.format == LORA else checkpoint.tree,
        artifact.tree.weight_bytes,
        weights=files[0] if files else "",
        made_from=(artifact.digest,),
        adapters=unmerged_adapters(request.file, target, sources),
    )
    note["cached"] = is_written(config.files, request.folder(target))
    return config


def quantized(
    file: RecipeFile,
    target: Target,
    sources: Sources,
    checkpoint: Checkpoint,
    tools: Tools,
    note: dict[str, Json],
) -> Artifact:
    """Return the weights in the target's format, by the recipe's options for it."""
    if target.format == LORA:
        artifact = beside(file, target, sources, tools)
    else:
        wanted = wanted_of(file, target.format, sources.base, tools)
        artifact = quantizing.quantize(checkpoint, wanted, tools)
    note["cached"] = artifact.details.get("cached", True)
    return artifact


def measured(
    file: RecipeFile,
    checkpoint: Checkpoint,
    artifact: Artifact,
    tools: Tools,
    note: dict[str, Json],
) -> Artifact:
    """Return the artifact with what it lost of the merged model among its details."""
    artifact = with_quality(file, checkpoint, artifact, tools)
    note["cached"] = artifact.details.get("quality", {}).get("cached", True)
    return artifact


def beside(file: RecipeFile, target: Target, sources: Sources, tools: Tools) -> Artifact:
    """Return base and adapters unmerged, as files that the target's engine loads."""
    if "gguf" not in target.engine.accepts:
        return unmerged(sources)
    base = Checkpoint(tree=sources.base.tree, made_from=(sources.base.digest,))
    wanted = wanted_of(file, formats()["f16"], sources.base, tools)
    return unmerged_gguf(sources, quantizing.quantize(base, wanted, tools), tools)


def validated(
    request: BuildRequest,
    sources: Sources,
    checkpoint: Checkpoint,
    tools: Tools,
    note: dict[str, Json],
) -> Checkpoint:
    """Return the checkpoint as validated; as it is where nothing was merged or nobody wants it.

    Raises CheckFailed where it is not base and adapters; the report is kept.
    """
    recipe = request.file.recipe
    note["cached"] = True
    if not sources.adapters:
        return checkpoint
    if not recipe.validation.enabled:
        tools.progress.warn("the recipe turns `validate` off: nobody compared the merged weights")
        return checkpoint
    try:
        proven = validating.validate(checkpoint, sources, recipe.merge, probes(request.file), tools)
    except CheckFailed as error:
        judged = replace(checkpoint, details={**checkpoint.details, "validation": error.details})
        raise refusal(Record(request, sources, judged, tools), (), {}, error) from None
    note["cached"] = proven.details["validation"]["cached"]
    return proven


def refusal(
    record: Record,
    results: tuple[Result, ...],
    stages: Mapping[str, Mapping[str, Json]],
    error: CheckFailed,
) -> CheckFailed:
    """Return a gate's error with the report that is kept of it."""
    record.tools.progress.warn(f"not published: {error.message}")
    report = record.refuse(results, stages, error.message)
    return CheckFailed(error.message, hint=f"{error.hint}\nreport: {report}", details=error.details)


def prove(
    baking: Baking,
    image: Image,
    expected: tuple[Result, ...],
    record: Record,
    clock: Clock,
    note: dict[str, Json],
) -> tuple[Result, ...]:
    """Start the image unless this very one was proven before, and score its answers.

    Raises CheckFailed where it does not start or keep its promises; the report is kept.
    """
    request, tools, trial = baking.request, baking.tools, baking.trial(expected)
    if baking.config.plan["device"] != "cpu" and not tools.engine.describe().get("gpu"):
        tools.progress.warn("the image is for a GPU and none is here: it was not started")
        return expected
    if not is_own(image):
        tools.progress.warn(f"the image is for {image.platform} alone: it was not started")
        return expected
    note["cached"] = is_proven(image.digest, trial, tools)
    if note["cached"]:
        answers = tuple(known_answers(trial, one, tools) or () for one in trial.asked)
    else:
        layout = request.trial_layout(baking.target)
        try:
            with publishing.candidate(image, layout, tools) as started:
                answers = ask(started, image.digest, trial, tools)
        except CheckFailed as error:
            raise refusal(record, expected, clock.stages, error) from None
    return with_image(expected, answers, tools)


def judge(
    record: Record, results: tuple[Result, ...], stages: Mapping[str, Mapping[str, Json]]
) -> None:
    """Raise CheckFailed when a model lost more than the recipe allows; the report is kept."""
    try:
        for result in results:
            result.require()
    except CheckFailed as error:
        raise refusal(record, results, stages, error) from None


def judge_quality(
    record: Record, results: tuple[Result, ...], stages: Mapping[str, Mapping[str, Json]]
) -> None:
    """Raise CheckFailed where quantizing lost too much; the report is kept."""
    if record.artifact is None:
        raise AssertionError("there is nothing to judge")
    for text in record.artifact.details.get("warnings", ()):
        record.tools.progress.warn(text)
    if fault := quality_fault(record.request.file, record.artifact):
        raise refusal(record, results, stages, fault)


def deliver(
    baking: Baking,
    checkpoint: Checkpoint,
    scores: Mapping[str, Score],
    note: dict[str, Json],
) -> Published:
    """Publish with what is known of it, unless every output holds this very image already."""
    request, tools = baking.request, baking.tools
    image = baking.whole(scores)
    outputs, trial = request.outputs_of(baking.target), request.trial_layout(baking.target)
    name = reference(request.file.recipe, baking.target.name)
    held = publishing.is_held(image, name, outputs, tools)
    if held and not outputs.push:
        note["cached"] = True
        publishing.discard_candidate(own_of(image), trial, tools)
        return publishing.describe(image, name, outputs)
    if trial is not None and outputs.layout is None:  # tried from a layout that nobody asked for
        publishing.discard_candidate(own_of(image), trial, tools)
    attachments = [evidence(one) for one in baking.made(checkpoint, scores)]
    published = publishing.publish(image, name, outputs, attachments, tools)
    note["cached"] = held and not published.uploaded_bytes and not published.mounted
    return published
