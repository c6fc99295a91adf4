"""Artifact, ServingConfig and bases -> images, assembled in memory without writing files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from weightsmith.checkpoints.reshard import Resharded, reshard
from weightsmith.errors import InputRefused
from weightsmith.evaluating.results import Result
from weightsmith.oci.collisions import first_collision
from weightsmith.oci.image import Healthcheck, Image, ImageConfig
from weightsmith.oci.index import own_of
from weightsmith.oci.layers import Layer, Member, TarLayer
from weightsmith.oci.limits import check_layers
from weightsmith.oci.modelpack import ModelDescription, model_pack
from weightsmith.oci.references import Reference
from weightsmith.oci.weights import max_weight_layers, weight_layers
from weightsmith.outcome import Outcome, Timer
from weightsmith.ports import Store
from weightsmith.provenance.labels import (
    ARTIFACT,
    ENGINE_LABEL,
    engine_version,
    result_labels,
)
from weightsmith.provenance.materials import ImageInputs, ImageMaterials, facts_of, whole_image
from weightsmith.provenance.mlbom import license_of
from weightsmith.provenance.roles import assemble_in_roles
from weightsmith.serving.parameters import parameters
from weightsmith.serving.plan import ServingConfig
from weightsmith.tools import Tools

USER = "65532:65532"
"""The unprivileged user of images, as a number because an image may have no user database."""
_PLAIN_BITS = 16


def bake(
    prepare: Callable[[], ImageInputs],
    name: str,
    tools: Tools,
    *,
    push: bool = False,
    earlier: Sequence[str] = (),
) -> Outcome[tuple[ImageMaterials, ...]]:
    """Return the image for each platform of the base: base, weight layers and a settings layer.

    A ModelPack is one artifact for all platforms.

    `prepare` returns the inputs; it takes minutes if a base is assembled here. The weight
    layers are the same for every kind of image. The store caches layer digests, so an unchanged
    file is not hashed again. `earlier` are the layers of the previous image; if the layers are the
    same, the outcome is cached.

    Raises UsageError for more than 125 layers, for a file that cannot be split to fit a layer,
    and with `push` for a layer that the registry of `name` does not accept; InputRefused for a
    base whose files would hide the weights below it.
    """
    timer = Timer("bake", name, tools)
    inputs = prepare()
    split = Resharded(inputs.artifact.tree, {})
    if inputs.largest_layer:
        split = reshard(split.tree, inputs.largest_layer, tools.store.memo)
    made = tuple(_made(inputs, split, base, (), tools.store) for base in inputs.bases or (None,))
    layers = own_of(whole_image(made)).layers
    if push:
        sizes = [(layer.file or layer.digest.short, layer.size) for layer in layers]
        check_layers(sizes, Reference.parse(name).registry)
    return timer.done(made, cached=[layer.digest for layer in layers] == list(earlier))


def with_scores(
    made: Sequence[ImageMaterials], results: tuple[Result, ...], store: Store
) -> tuple[ImageMaterials, ...]:
    """Return the images with scores and verdict as labels; the layers do not change."""
    return tuple(_made(one.inputs, one.split, one.base, results, store) for one in made)


def _made(
    inputs: ImageInputs,
    split: Resharded,
    base: Image | None,
    results: tuple[Result, ...],
    store: Store,
) -> ImageMaterials:
    """Return one platform's image with its materials."""
    if inputs.kind == "modelpack":
        image = _packed(inputs, split, results)
        return ImageMaterials(inputs=inputs, split=split, base=None, image=image, results=results)
    config, model_dir, below = inputs.config, inputs.engine.model_dir, base.layers if base else ()
    if inputs.order == "weights-first" and base:
        _require_clear(base, inputs.base_name, model_dir, store)
    weights = weight_layers(
        split.tree,
        model_dir,
        memo=store.memo,
        most=max_weight_layers(len(below)),
        largest=inputs.largest_layer,
        contents=split.contents,
    )
    labels = {
        ARTIFACT: split.tree.digest,
        **({ENGINE_LABEL: inputs.engine.name} if config else {}),
        **inputs.labels,
        **result_labels(results),
    }
    image = assemble_in_roles(
        weights,
        _settings(config),
        _added(config, labels),
        base,
        inputs.base_name,
        order=inputs.order,
        version=engine_version(base.labels) if base and config else "",
    )
    return ImageMaterials(inputs=inputs, split=split, base=base, image=image, results=results)


def _packed(inputs: ImageInputs, split: Resharded, results: tuple[Result, ...]) -> Image:
    """Return the model's files as a ModelPack, with the labels as annotations."""
    format_, facts = inputs.artifact.format, facts_of(inputs.artifact.tree)
    license_ = license_of(split.tree.texts)
    count = 0
    with suppress(InputRefused):  # the number is not known for every architecture
        count = parameters(facts).all if facts else 0
    description = ModelDescription(
        name=inputs.name,
        version=inputs.version,
        family=facts.model_type if facts else "",
        licenses=(license_,) if license_ else (),
        format=format_.suffix.removeprefix("."),
        parameters=count,
        precision=facts.stated_dtype if facts else "",
        quantization=format_.name if format_.bits_per_weight < _PLAIN_BITS else "",
        sees_images=bool(facts and facts.sees_images),
    )
    annotations = {ARTIFACT: split.tree.digest, **inputs.labels, **result_labels(results)}
    return model_pack(split.tree, description, annotations, split.contents)


def _settings(config: ServingConfig | None) -> tuple[Layer, ...]:
    """Return the layer of the engine's configuration files, if there are any."""
    inside = config.image_files if config else {}
    files = tuple(
        Member.of_bytes(path.lstrip("/"), text.encode()) for path, text in sorted(inside.items())
    )
    return (TarLayer(members=files),) if files else ()


def _require_clear(base: Image, name: str, model_dir: str, store: Store) -> None:
    """Raise InputRefused if the base has files in the folder of the weights."""
    if found := first_collision(base, [model_dir.strip("/")], store.memo):
        raise InputRefused(
            f"the base {name} has /{found}, which would hide weights below it",
            hint="use the order engine-first, or another base",
        )


def _added(config: ServingConfig | None, labels: Mapping[str, str]) -> ImageConfig:
    if config is None:
        return ImageConfig(user=USER, labels=labels)
    return ImageConfig(
        user=USER,
        env=dict(sorted(config.env.items())),  # an order that survives the label
        entrypoint=config.entrypoint or None,
        cmd=config.command,
        ports=(config.port,),
        healthcheck=Healthcheck(command=config.healthcheck) if config.healthcheck else None,
        labels=labels,
    )
