"""The inputs of a recipe's images, and the questions for the started image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from weightsmith.checkpoints.templates import own_template, takes_parts
from weightsmith.evaluating.results import Result, verdict_of
from weightsmith.oci.index import own_of, whole_of
from weightsmith.planning.bases import bases_of
from weightsmith.planning.options import unmerged_adapters
from weightsmith.planning.request import BuildRequest
from weightsmith.provenance.attest import public_recipe
from weightsmith.provenance.labels import PLAN, PREFIX, TESTED, VERDICT, labels, result_labels
from weightsmith.provenance.materials import ImageInputs
from weightsmith.quality.result import Quality
from weightsmith.quantizers import of_format
from weightsmith.serving.plan import ServingConfig
from weightsmith.serving.targets import Target
from weightsmith.stages.bake import layer_limit
from weightsmith.stages.base import base_images, data_base, public_base
from weightsmith.stages.evaluate import Evaluation, Question
from weightsmith.tools import Tools
from weightsmith.values import LORA, Artifact, Checkpoint, Digest, Sources


def image_inputs(
    request: BuildRequest,
    target: Target,
    sources: Sources,
    checkpoint: Checkpoint,
    artifact: Artifact,
    quality: Quality | None,
    config: ServingConfig,
    tools: Tools,
) -> ImageInputs:
    """Return the inputs of a target's images, with the bases that the lock pins.

    Raises what `bases_of` raises.
    """
    recipe = request.file.recipe
    base_name, bases = bases_of(request, target, config.plan.device, tools)
    settings, packed = recipe.image, artifact.format.packed
    return ImageInputs(
        name=recipe.name,
        version=recipe.version,
        artifact=artifact,
        engine=target.engine,
        config=config,
        bases=bases,
        base_name=public_base(base_name),
        labels=labels(recipe, sources, artifact, quality, config),
        order=settings.order,
        largest_layer=layer_limit(settings.max_layer_size),
        parameters={"target": target.name, "recipe": public_recipe(recipe)},
        sources=sources,
        checkpoint=checkpoint,
        recipe=recipe,
        quantizer_builder=of_format(artifact.format.name).builder if packed else "",
        network_in_jobs=network_in_jobs(checkpoint, artifact, tools),
    )


def form_inputs(
    image: ImageInputs, kind: str, tested: Digest | None, results: Sequence[Result], tools: Tools
) -> ImageInputs:
    """Return the inputs of another kind of the same weights.

    It is not started itself, so its labels name the image that was, with that one's scores:
    `tested` is its digest, None if none could be started.
    """
    base_name = data_base(kind, "")
    labels = {key: text for key, text in image.labels.items() if key != PLAN}
    platforms = image.recipe.image.platforms if image.recipe else ()
    return replace(
        image,
        kind=kind,
        config=None,
        layers_below=max((len(base.layers) for base in image.bases), default=0),
        context=image.config.plan.max_model_len if image.config else 0,
        bases=base_images(base_name, "", tools, platforms=platforms) if base_name else (),
        platforms=platforms,
        base_name=public_base(base_name),
        labels={
            **labels,
            PREFIX + "kind": kind,
            **result_labels(results),
            **({TESTED: tested} if tested else {}),
            VERDICT: verdict_of(results),
        },
        parameters={**image.parameters, "kind": kind},
    )


def network_in_jobs(checkpoint: Checkpoint, artifact: Artifact | None, tools: Tools) -> bool:
    """Return whether any job had network access, in this build or for a cached result."""
    made = (checkpoint.details, artifact.details if artifact else {})
    return tools.runner.networked or any(details.get("network_in_jobs") for details in made)


def evaluation_of(
    request: BuildRequest, target: Target, inputs: ImageInputs, results: Sequence[Result]
) -> Evaluation:
    """Return the questions for this machine's image, and what its answers depend on."""
    if inputs.config is None or inputs.sources is None or inputs.checkpoint is None:
        raise AssertionError("an image built from a recipe has a serving configuration")
    served = inputs.sources.base if target.format == LORA else inputs.checkpoint
    template = own_template(served.tree.texts)
    return Evaluation(
        artifact=inputs.artifact,
        config=inputs.config,
        base=own_of(whole_of(inputs.bases)).digest,
        engine=target.engine,
        chat=template is not None,
        parts=template is None or takes_parts(template),
        questions=tuple(_question(request, target, inputs.sources, one) for one in results),
    )


def _question(
    request: BuildRequest, target: Target, sources: Sources | None, result: Result
) -> Question:
    """Return a task with the adapter that answers it, if the image serves several."""
    number = result.task.adapter
    if target.format != LORA or sources is None or number is None or len(sources.adapters) == 1:
        return Question(result=result)
    if fields_of := target.engine.adapter_fields:
        return Question(result=result, fields=fields_of(number))
    served = unmerged_adapters(request.file, target, sources)
    return Question(result=result, model=served[number].name)
