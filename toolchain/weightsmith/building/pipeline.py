"""The steps of a build: what `invoke build` does, in its order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from weightsmith.building.request import BuildRequest
from weightsmith.core.values import (
    SAFETENSORS,
    Artifact,
    Checkpoint,
    Form,
    Format,
    Published,
    Sources,
)
from weightsmith.evaluating.items import Item
from weightsmith.evaluating.results import (
    RecipeTask,
    Result,
    earlier_replay,
    probes,
    replay_items,
    tasks_of,
)
from weightsmith.evaluating.speed import Speed
from weightsmith.provenance.attest import ImageMaterials
from weightsmith.quantizers import formats, of_format
from weightsmith.quantizers.quality.result import QualityResult
from weightsmith.serving.plan import ServingConfig, ServingPlan
from weightsmith.serving.targets import Target
from weightsmith.stages.bake import BakeStep, FormStep, LabelStep, ThinStep
from weightsmith.stages.bench import BenchStep
from weightsmith.stages.cache_scales import CacheScalesStep
from weightsmith.stages.dequantized import DequantizedStep
from weightsmith.stages.draft import BesideStep, DraftAloneStep
from weightsmith.stages.evaluate import EvaluateStep
from weightsmith.stages.merge import MergeStep
from weightsmith.stages.parsers import ParsersStep
from weightsmith.stages.publish import PermitStep, PublishFormStep, PublishStep
from weightsmith.stages.quality import QualityStep
from weightsmith.stages.quantize import DraftStep, QuantizeStep, draft_format
from weightsmith.stages.reference import ReferenceStep
from weightsmith.stages.render import (
    PoliciesStep,
    RenderStep,
    ThinConfigStep,
    ThinManifestsStep,
    VolumeManifestsStep,
)
from weightsmith.stages.resolve import ResolveStep
from weightsmith.stages.unmerged import BaseAloneStep, BaseStep, UnmergedStep
from weightsmith.stages.upload import CheckHubStep, UploadStep
from weightsmith.stages.validate import ValidateStep
from weightsmith.steps.served_adapters import adapter_forms
from weightsmith.steps.step import AnyStep, ForeseenWeights, Step, TargetBuild, Trial
from weightsmith.steps.thin import THIN
from weightsmith.validating.result import Validation

Weights = Step[Artifact, ForeseenWeights]
ASSEMBLY = frozenset({RenderStep.name, BakeStep.name, PublishStep.name})
"""Stages that no job runs: they take no time, and are done for each place anew."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetSteps:
    """The steps of one target in their order, and those of them whose results are recorded."""

    of: TargetBuild
    steps: tuple[AnyStep, ...]
    weights: Weights
    quality: Step[QualityResult | None, None]
    served: Weights
    """The same weights, with what lies beside them in the image."""
    config: Step[ServingConfig, ServingPlan]
    image: Step[tuple[ImageMaterials, ...], Mapping[str, str]]
    labelled: Step[tuple[ImageMaterials, ...], None]
    """As it is published: with its scores and its replay set."""
    trials: tuple[Step[Trial, None], ...]
    """The last that has run has all scores."""
    bench: Step[Speed, None] | None
    """None if the recipe asks for no speed, and no results file was given."""
    published: Step[Published, None]
    forms: tuple[tuple[str, Step[Form, None]], ...]
    """What else is published of the same weights, by kind."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildSteps:
    """A build's graph: the steps that all targets share, and each target's own."""

    sources: Step[Sources, Sources]
    checkpoint: Step[Checkpoint, ForeseenWeights]
    validation: Step[Validation | None, None]
    expected: Step[tuple[Result, ...], None]
    """The answers that the image's are compared with."""
    tasks: tuple[RecipeTask, ...]
    shared: tuple[AnyStep, ...]
    targets: tuple[TargetSteps, ...]

    def __iter__(self) -> Iterator[AnyStep]:
        """Yield every step, each after those that it needs."""
        yield from self.shared
        for target in self.targets:
            yield from target.steps


def steps_of(request: BuildRequest) -> BuildSteps:
    """Return the steps of a build whose sources are pinned; reads the questions, nothing else.

    Raises UsageError for a recipe that cannot be built.
    """
    file, tasks = request.file, tasks_of(request.file)
    merged = [one.format for one in request.targets if not one.format.unmerged]
    merges = bool(file.recipe.adapters and merged)
    # Some quantizers read base and adapters instead of merged weights.
    files = not all(one.name in formats() and of_format(one.name).computed for one in merged)
    asked, replay = probes(file), replay_items(file)

    sources = ResolveStep(file=file, locked=request.locked, update_lock=request.update_lock)
    checkpoint = MergeStep(file=file, sources=sources, merges=merges, files=files)
    validation = ValidateStep(
        file=file, sources=sources, checkpoint=checkpoint, merges=merges, probes=asked
    )
    expected = ReferenceStep(
        file=file,
        sources=sources,
        checkpoint=checkpoint,
        validation=validation,
        tasks=tasks,
        merges=merges,
    )
    return BuildSteps(
        sources=sources,
        checkpoint=checkpoint,
        validation=validation,
        expected=expected,
        tasks=tasks,
        shared=(sources, checkpoint, validation, expected),
        targets=tuple(
            _of_target(request, one, expected, validation, replay) for one in request.targets
        ),
    )


def _of_target(
    request: BuildRequest,
    target: Target,
    expected: ReferenceStep,
    validation: ValidateStep,
    replay: tuple[Item, ...],
) -> TargetSteps:
    of, sources = request.of(target), expected.sources
    parts = _weights(request, of, expected)
    checkpoint, weights = parts.checkpoint, parts.weights
    parsers = ParsersStep(of=of, checkpoint=checkpoint)
    made = (*parts.steps, parsers)
    # A base in 16 bits is what its adapters were trained on.
    measured = parts.quantized if target.format.without_adapters.packed else weights

    quality = QualityStep(of=of, checkpoint=checkpoint, weights=measured)
    scaled = CacheScalesStep(of=of, checkpoint=checkpoint, weights=weights, sources=sources)
    drafts, draft = _draft_of(of, sources)
    served: Weights = scaled
    if draft:
        made = (*made, scaled, *drafts)
        served = BesideStep(
            of=of, sources=sources, checkpoint=checkpoint, weights=scaled, draft=draft
        )
    config = RenderStep(
        of=of,
        sources=sources,
        checkpoint=checkpoint,
        weights=weights,
        served=served,
        parsers=parsers,
        draft=draft,
    )
    image = BakeStep(
        of=of,
        sources=sources,
        checkpoint=checkpoint,
        weights=served,
        undrafted=scaled if draft else None,
        quantized=parts.quantized,
        quality=quality,
        config=config,
    )
    started = EvaluateStep(
        of=of,
        image=image,
        expected=expected,
        validation=validation,
        replay=replay,
        earlier=earlier_replay(of.file, of.target.name),
        candidacy=request.choice.candidacy if request.choice else None,
    )
    answered = DequantizedStep(
        of=of,
        sources=sources,
        checkpoint=checkpoint,
        weights=measured,
        config=config,
        trial=started,
        tasks=expected.tasks,
    )
    labelled = LabelStep(of=of, image=image, trial=answered)
    steps: list[AnyStep] = [*made, quality, served, config, image, started, answered, labelled]
    bench = None
    if of.file.recipe.bench or request.bench_results:
        bench = BenchStep(
            of=of,
            config=config,
            image=image,
            labelled=labelled,
            trial=answered,
            results=request.bench_results,
        )
        steps.append(bench)

    places = {kind: request.outputs_of_form(target, kind) for kind in request.forms_of(target)}
    adapters = {form: number for number, form in enumerate(adapter_forms(of.file.recipe))}
    forms = {
        kind: FormStep(
            of=of,
            kind=kind,
            adapter=adapters.get(kind),
            push=to.push,
            image=labelled,
            trial=answered,
        )
        for kind, to in places.items()
        if kind != THIN
    }
    moved = ThinConfigStep(of=of, rendered=config)
    if thin := places.get(THIN):
        steps.append(moved)
        forms[THIN] = ThinStep(
            of=of,
            kind=THIN,
            push=thin.push,
            image=labelled,
            trial=answered,
            sources=sources,
            weights=weights,
            config=moved,
        )
    hub = request.hub_of(target)
    if hub:
        steps.append(CheckHubStep(of=of, destination=hub, weights=scaled))
    pushed = tuple(kind for kind, to in places.items() if to.push)
    permit = PermitStep(of=of, image=labelled, forms=tuple(forms.items()), pushed=pushed)
    published = PublishStep(
        of=of, sources=sources, weights=served, image=labelled, checked=permit, forms=permit.forms
    )
    others = {
        kind: PublishFormStep(of=of, kind=kind, outputs=to, form=forms[kind], image=published)
        for kind, to in places.items()
    }
    every: dict[str, Step[Form, None]] = {**others}
    steps += [*forms.values(), permit, published, *others.values()]
    if of.outputs.push:
        steps.append(PoliciesStep(of=of, image=published, materials=labelled))
    if volume := others.get("volume"):
        steps.append(VolumeManifestsStep(of=of, config=config, image=image, volume=volume))
    if shown := others.get(THIN):
        steps.append(
            ThinManifestsStep(
                of=of, config=moved, form=forms[THIN], thin=shown, pushed=THIN in pushed
            )
        )
    if hub:
        every["hub"] = UploadStep(of=of, destination=hub, weights=scaled, image=published)
        steps.append(every["hub"])
    return TargetSteps(
        of=of,
        steps=tuple(steps),
        weights=weights,
        quality=quality,
        served=served,
        config=config,
        image=image,
        labelled=labelled,
        trials=(started, answered),
        bench=bench,
        published=published,
        forms=tuple(every.items()),
    )


def _draft_of(
    of: TargetBuild, sources: Step[Sources, Sources]
) -> tuple[tuple[AnyStep, ...], Weights | None]:
    """Return the steps that make what drafts, in its engine's usual format, and the last one."""
    if of.file.recipe.draft is None:
        return (), None
    alone = DraftAloneStep(of=of, sources=sources)
    checkpoint = BaseStep(of=of, sources=alone)
    made = DraftStep(
        of=of, sources=alone, checkpoint=checkpoint, format=draft_format(of.target.engine)
    )
    return (alone, checkpoint, made), made


@dataclass(frozen=True, slots=True, kw_only=True)
class _WeightSteps:
    """The steps that make a target's weights."""

    steps: tuple[AnyStep, ...]
    checkpoint: Step[Checkpoint, ForeseenWeights]
    """What is quantized: adapters that are not merged change nothing of it."""
    quantized: Weights
    weights: Weights
    """Those, with adapters that lie beside them."""


def _weights(request: BuildRequest, of: TargetBuild, expected: ReferenceStep) -> _WeightSteps:
    unmerged, sources = of.target.format.unmerged, expected.sources
    alike = [_made(one) for one in request.targets if one.format.unmerged == unmerged]
    alone = BaseAloneStep(of=of, sources=sources)
    base = BaseStep(of=of, sources=alone)
    checkpoint = base if unmerged else expected.checkpoint
    quantized = QuantizeStep(
        of=of,
        sources=alone if unmerged else sources,
        checkpoint=checkpoint,
        format=_made(of.target),
        in_one_pass=tuple(one for one in alike if one.packed),
    )
    weights: Weights = quantized
    steps: tuple[AnyStep, ...] = (quantized,)
    if unmerged:
        weights = UnmergedStep(of=of, sources=sources, base=quantized)
        steps = (alone, base, quantized, weights)
    return _WeightSteps(steps=steps, checkpoint=checkpoint, quantized=quantized, weights=weights)


def _made(target: Target) -> Format:
    """Return the format in which a target's weights, or the base of its adapters, are made."""
    own = target.format.without_adapters
    if not own.unmerged:
        return own
    return formats()["f16"] if "gguf" in target.engine.accepts else SAFETENSORS
