"""The order of the stages: what `invoke build` does, told once."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from toolchain.errors import CheckFailed
from toolchain.evaluating.items import Item
from toolchain.evaluating.metrics import gate, score_answers
from toolchain.oci.image import Image
from toolchain.oci.references import Reference
from toolchain.oci.registry import Registry
from toolchain.planning import BuildRequest, check_before_work, questions, serving_config
from toolchain.ports import Tools
from toolchain.provenance.labels import labels, reference, score_labels
from toolchain.recipe import RecipeFile
from toolchain.serving.targets import Target
from toolchain.stages import merge as merging
from toolchain.stages import publish as publishing
from toolchain.stages import quantize as quantizing
from toolchain.stages import reference as references
from toolchain.stages.bake import bake
from toolchain.stages.base import base_image, base_reference
from toolchain.stages.record import Facts, write_record
from toolchain.stages.render import portable
from toolchain.stages.report import write_report
from toolchain.stages.resolve import resolve
from toolchain.stages.trial import Trial, ask, is_proven, known_answers
from toolchain.values import (
    SAFETENSORS,
    Artifact,
    Checkpoint,
    Json,
    Published,
    Score,
    ServingConfig,
    Sources,
)


def build(request: BuildRequest, registry: Registry, tools: Tools) -> Iterator[Built]:
    """Yield each target's image: merged, quantized, planned, baked, proven, published."""
    recipe, clock = request.file.recipe, Clock(tools)
    items = questions(request.file)
    check_outputs(request, registry)
    with clock.stage("resolve", recipe.base.source):
        sources = resolve(request.file, tools)
        check_before_work(request, sources, tools)
    with clock.stage("merge", f"{len(sources.adapters)} adapter(s), {recipe.merge.method}") as said:
        checkpoint = merging.merge(sources, recipe.merge, tools)
        said["cached"] = checkpoint.details.get("cached", True)
    with clock.stage("reference", f"{len(items)} questions to base and adapter") as said:
        expected = reference_scores(request.file, sources, items, tools, said)
    for target in request.targets:
        timed = Clock(tools, dict(clock.stages))
        with timed.stage("quantize", target.format.name) as said:
            artifact = quantizing.quantize(checkpoint, recipe.name, target.format, {}, tools)
            said["cached"] = artifact.details.get("cached", True)
        with timed.stage("render", target.name):
            config = config_of(request, target, checkpoint, artifact)
        with timed.stage("bake", reference(recipe, target.name)):
            baking = Baking.of(request, target, sources, artifact, config, registry, tools)
            image = baking.image({})
        with timed.stage("evaluate", f"{len(items)} questions to the started image") as said:
            scores = expected | image_scores(baking, image, items, said)
        judge(baking, checkpoint, image, scores, timed.stages)
        with timed.stage("publish", reference(recipe, target.name)) as said:
            published = deliver(baking, baking.image(scores), registry, said)
        yield keep_record(baking, checkpoint, published, scores, timed.stages)


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """One finished target."""

    target: Target
    published: Published
    scores: Mapping[str, Score]
    stages: Mapping[str, Mapping[str, Json]]
    report: Path


@dataclass(slots=True)
class Clock:
    """Tells the user what runs, and keeps how long it took and whether it was cached."""

    tools: Tools
    stages: dict[str, dict[str, Json]] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str, detail: str = "") -> Iterator[dict[str, Json]]:
        """Time a stage; its body may set `cached`."""
        said: dict[str, Json] = {"cached": False, "seconds": 0.0}
        self.tools.progress.stage(name, detail)
        began = time.monotonic()
        yield said
        said["seconds"] = round(time.monotonic() - began, 3)
        self.stages[name] = said
        self.tools.progress.finish(name, float(said["seconds"]), bool(said["cached"]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Baking:
    """All that an image of one target is made of, but for its scores."""

    request: BuildRequest
    target: Target
    sources: Sources
    artifact: Artifact
    config: ServingConfig
    base: Image
    tools: Tools

    @classmethod
    def of(
        cls,
        request: BuildRequest,
        target: Target,
        sources: Sources,
        artifact: Artifact,
        config: ServingConfig,
        registry: Registry,
        tools: Tools,
    ) -> Baking:
        """Bring the base image, and put it beside the rest."""
        wanted = request.file.recipe.image.base
        name = base_reference(target.engine, str(config.plan["device"]), wanted)
        return cls(
            request=request,
            target=target,
            sources=sources,
            artifact=artifact,
            config=config,
            base=base_image(name, target.engine.name, registry, tools),
            tools=tools,
        )

    def image(self, scores: Mapping[str, Score]) -> Image:
        """Return the image; scores become labels, so that it can be judged by itself."""
        plan = portable(self.config.plan)
        said = labels(self.request.file.recipe, self.sources, self.artifact, self.config, plan)
        return bake(
            self.artifact,
            self.config,
            base=self.base,
            labels={**said, **score_labels(scores)},
            store=self.tools.store,
            model_dir=self.target.engine.model_dir,
        )

    def trial(self, items: tuple[Item, ...]) -> Trial:
        """Return what the image is asked, and what its answers depend on."""
        wanted = self.request.file.recipe.evaluate
        return Trial(
            artifact=self.artifact,
            config=self.config,
            base=self.base.digest,
            items=items,
            max_tokens=wanted.max_tokens if wanted else 1,
            memory_bytes=int(self.config.plan["memory_limit_bytes"]),
            questions=references.questions_digest(items),
            port_variable=self.target.engine.port_variable,
            host_variable=self.target.engine.host_variable,
            threads_variable=self.target.engine.threads_variable,
            neutral=self.target.engine.neutral_settings,
        )


def check_outputs(request: BuildRequest, registry: Registry) -> None:
    """Notice before the work that what it makes could not be pushed."""
    if request.outputs.push:
        target = request.targets[0].name
        registry.check_push(Reference.parse(reference(request.file.recipe, target)))


def config_of(
    request: BuildRequest, target: Target, checkpoint: Checkpoint, artifact: Artifact
) -> ServingConfig:
    """Plan and render for the artifact as it came out."""
    files = [f.path for f in artifact.tree.files if f.path.endswith(f".{artifact.format.kind}")]
    return serving_config(
        request.file,
        target,
        checkpoint.tree,
        artifact.tree.size,
        weights=files[0] if files else "",
        made_from=(artifact.digest,),
    )


def reference_scores(
    file: RecipeFile,
    sources: Sources,
    items: tuple[Item, ...],
    tools: Tools,
    said: dict[str, Json],
) -> dict[str, Score]:
    """Return the scores of the base and of base+adapter on the recipe's questions."""
    wanted = file.recipe.evaluate
    if wanted is None:
        return {}
    subjects = {"base": sources.adapters[:0]}
    if sources.adapters:
        subjects["adapter"] = sources.adapters
    said["cached"] = all(
        tools.store.find(references.inputs(sources, adapters, items, wanted.max_tokens).key)
        for adapters in subjects.values()
    )
    return {
        name: score_answers(
            references.answers(sources, adapters, items, wanted.max_tokens, tools),
            items,
            wanted.metric,
        )
        for name, adapters in subjects.items()
    }


def image_scores(
    baking: Baking, image: Image, items: tuple[Item, ...], said: dict[str, Json]
) -> dict[str, Score]:
    """Start the image unless this very one was proven before, and score its answers."""
    request, tools, trial = baking.request, baking.tools, baking.trial(items)
    if baking.config.plan["device"] != "cpu" and not tools.engine.describe().get("gpu"):
        tools.progress.warn("the image is for a GPU and none is here: it was not started")
        return {}
    said["cached"] = is_proven(image.digest, trial, tools)
    if said["cached"]:
        answers = known_answers(trial, tools) or ()
    else:
        layout = request.trial_layout(baking.target)
        with publishing.candidate(image, layout, tools) as started:
            answers = ask(started, image.digest, trial, tools)
    wanted = request.file.recipe.evaluate
    return {"image": score_answers(answers, items, wanted.metric)} if wanted else {}


def judge(
    baking: Baking,
    checkpoint: Checkpoint,
    image: Image,
    scores: Mapping[str, Score],
    stages: Mapping[str, Mapping[str, Json]],
) -> None:
    """Raise CheckFailed when the image lost more than the recipe allows; the report is kept."""
    wanted = baking.request.file.recipe.evaluate
    if wanted is None or "image" not in scores:
        return
    try:
        against = scores.get("adapter", scores.get("base"))
        gate(scores["image"], against, wanted.max_drop, wanted.min_score)
    except CheckFailed as error:
        layout = baking.request.trial_layout(baking.target)
        publishing.discard_candidate(image, layout, baking.tools)
        baking.tools.progress.warn(f"not published: {error.message}")
        unpublished = Published(reference="", digest=image.digest, layers=())
        # Apart: the record of an earlier image that passed belongs to that image.
        folder = baking.request.folder(baking.target) / "refused"
        built = keep_record(baking, checkpoint, unpublished, scores, stages, folder)
        raise CheckFailed(error.message, hint=f"{error.hint}\n  report: {built.report}") from None


def deliver(baking: Baking, image: Image, registry: Registry, said: dict[str, Json]) -> Published:
    """Publish, unless every output holds this very image already."""
    request, tools = baking.request, baking.tools
    outputs = request.outputs_of(baking.target)
    name = reference(request.file.recipe, baking.target.name)
    said["cached"] = publishing.is_published(image, name, outputs, tools)
    if said["cached"]:
        if request.engine_answers:
            publishing.discard_candidate(image, None, tools)
        return publishing.describe(image, name, outputs)
    return publishing.publish(image, name, outputs, registry, tools)


def keep_record(
    baking: Baking,
    checkpoint: Checkpoint,
    published: Published,
    scores: Mapping[str, Score],
    stages: Mapping[str, Mapping[str, Json]],
    folder: Path | None = None,
) -> Built:
    """Write build.json, the report and the rendered files of one target."""
    request = baking.request
    folder = folder or request.folder(baking.target)
    facts = Facts(
        recipe=request.file.recipe,
        sources=baking.sources,
        checkpoint=checkpoint,
        artifact=baking.artifact,
        config=baking.config,
        published=published,
        scores=scores,
        stages=stages,
        warnings=tuple(getattr(baking.tools.progress, "warnings", ())),
        inputs=stage_inputs(baking, checkpoint),
    )
    html, _ = write_report(write_record(facts, folder), folder)
    return Built(
        target=baking.target, published=published, scores=scores, stages=stages, report=html
    )


def stage_inputs(baking: Baking, checkpoint: Checkpoint) -> Mapping[str, Json]:
    """Return what each cached stage depended on."""
    recipe, sources = baking.request.file.recipe, baking.sources
    found = {"merge": merging.inputs(sources, recipe.merge).inputs}
    if recipe.evaluate is not None:
        items = questions(baking.request.file)
        found["reference"] = references.inputs(
            sources, sources.adapters, items, recipe.evaluate.max_tokens
        ).inputs
    if baking.artifact.format != SAFETENSORS:
        found["quantize"] = quantizing.inputs(
            checkpoint.digest, recipe.name, baking.artifact.format, {}
        ).inputs
    return found
