"""What is published of a target beside its image: other forms of the weights, a hub, manifests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from weightsmith.build_record import read_build
from weightsmith.errors import WeightsmithError
from weightsmith.evaluating.results import Result
from weightsmith.oci.image import Image
from weightsmith.oci.index import own_of
from weightsmith.oci.manifests import OLLAMA_MODEL, OLLAMA_PROJECTOR
from weightsmith.oci.ollama import modelfile
from weightsmith.oci.references import Reference
from weightsmith.outcome import Outcome
from weightsmith.planning.images import form_inputs
from weightsmith.planning.request import BuildRequest
from weightsmith.planning.volumes import FOLDER, volume_files
from weightsmith.provenance.labels import reference as name_of
from weightsmith.provenance.materials import ImageInputs, ImageMaterials, whole_image
from weightsmith.recording import Record
from weightsmith.reporting.card import card_of_build
from weightsmith.serving.plan import ServingConfig
from weightsmith.serving.targets import Target
from weightsmith.stages.bake import bake
from weightsmith.stages.publish import discard_candidate, publish
from weightsmith.stages.record import write_files
from weightsmith.stages.report import model_card
from weightsmith.stages.upload import check_free, upload
from weightsmith.tools import Tools
from weightsmith.values import Artifact, Form, Uploaded


def forms_baked(
    record: Record, made: Sequence[ImageMaterials], results: tuple[Result, ...]
) -> Mapping[str, tuple[ImageMaterials, ...]]:
    """Return the other kinds that the recipe names, of the weights of a baked image, by kind.

    Before anything is published, checks that no tag already names something else, and that no hub
    holds another model. Raises UsageError if one does, without a candidate left.
    """
    request, target, tools = record.request, record.target, record.tools
    if target is None or record.artifact is None:
        raise AssertionError("there is no image yet")
    try:
        if place := request.hub_of(target):
            check_free(record.artifact.tree, place, tools.hub)
        return _baked(record, target, made, results)
    except WeightsmithError:
        layout = request.candidate_layout(target)
        with suppress(WeightsmithError):
            discard_candidate(own_of(whole_image(made)), layout, tools)
        raise


def _baked(
    record: Record,
    target: Target,
    made: Sequence[ImageMaterials],
    results: tuple[Result, ...],
) -> Mapping[str, tuple[ImageMaterials, ...]]:
    request, tools, found = record.request, record.tools, {}
    image, tested = made[0].inputs, whole_image(made).digest if record.started else None
    name = name_of(request.file.recipe, target.name)
    for kind in request.forms_of(target):
        prepare = partial(form_inputs, image, kind, tested, results, tools)
        push = request.outputs_of_form(target, kind).push
        found[kind] = bake(prepare, f"{name}-{kind}", tools, push=push).value
    if found and request.outputs.push and not request.outputs.force:
        tagged = {name: made, **{f"{name}-{kind}": one for kind, one in found.items()}}
        for tag, one in tagged.items():
            tools.registry.check_tag(Reference.parse(tag), whole_image(one).digest)
    return found


def forms(
    request: BuildRequest,
    target: Target,
    made: Mapping[str, tuple[ImageMaterials, ...]],
    tools: Tools,
) -> Mapping[str, Form]:
    """Publish the other kinds of a target's weights; return them by kind."""
    found: dict[str, Form] = {}
    for kind, one in made.items():
        outputs = request.outputs_of_form(target, kind)
        name = f"{name_of(request.file.recipe, target.name)}-{kind}"
        found[kind] = publish(one, name, outputs, tools, started_in=outputs.layout).value
        if kind == "ollama":
            folder, image = request.folder(target), own_of(whole_image(one))
            places = _blobs(image, outputs.layout, folder) if outputs.layout else [name]
            write_files({"Modelfile": modelfile(places, one[0].inputs.context)}, folder)
    return found


def _blobs(image: Image, layout: Path, folder: Path) -> list[str]:
    """Return where a layout has the GGUF files of an image for Ollama, seen from a folder."""
    blobs = [
        layout / "blobs" / "sha256" / layer.digest.hex
        for layer in image.layers
        if layer.media_type in (OLLAMA_MODEL, OLLAMA_PROJECTOR)
    ]
    return [
        f"./{blob.relative_to(folder)}" if blob.is_relative_to(folder) else str(blob)
        for blob in blobs
    ]


def write_volume(
    request: BuildRequest,
    target: Target,
    config: ServingConfig,
    image: ImageInputs,
    found: Mapping[str, Form],
    tools: Tools,
) -> None:
    """Write the manifests of a target's image of weights, if there is one."""
    if (volume := found.get("volume")) is None:
        return
    name = f"{name_of(request.file.recipe, target.name)}-volume@{volume.digest}"
    if files := volume_files(request, target, config, image, name):
        write_files(files, request.folder(target) / FOLDER)
    else:
        tools.progress.note(
            f"{target.name}: no manifests for the volume, because {target.engine.title} has no "
            f"image of its own for {config.plan.device} in a registry; image.base names one"
        )


def on_hub(
    request: BuildRequest, target: Target, artifact: Artifact, tools: Tools
) -> Outcome[Uploaded] | None:
    """Publish a target's weights on a hub, if wanted, with a card from its build.json."""
    place, recipe = request.hub_of(target), request.file.recipe
    if place is None:
        return None
    card = card_of_build(read_build(request.folder(target)))
    names = [entry.path for entry in artifact.tree.files]
    text = model_card(card, place.repository, names)
    return upload(artifact.tree, text, place, recipe.version, tools)
