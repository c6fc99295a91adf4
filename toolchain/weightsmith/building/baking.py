"""All that the images of one target are made of: one for each platform of its base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from weightsmith.building.artifacts import network_in_jobs
from weightsmith.building.planning import (
    BuildRequest,
    estimated_bytes,
    everything_cached,
    unmerged_adapters,
)
from weightsmith.building.proving import Result
from weightsmith.checkpoints.reshard import Resharded, reshard
from weightsmith.errors import InputRefused, UsageError
from weightsmith.oci.image import Image
from weightsmith.oci.index import Whole, is_own, whole_of
from weightsmith.oci.limits import check_layers, limits_of
from weightsmith.oci.references import Reference
from weightsmith.oci.registry import Registry
from weightsmith.ports import Silent, Tools
from weightsmith.provenance.labels import labels, reference, score_labels
from weightsmith.quantizers import of_format
from weightsmith.serving.memory import human, parse_size
from weightsmith.serving.targets import Target
from weightsmith.stages.attest import ImageMaterials, public_recipe
from weightsmith.stages.bake import bake
from weightsmith.stages.base import (
    ENGINE_LABEL,
    OWN,
    base_images,
    base_reference,
    bills_of,
    engine_version,
    public_base,
)
from weightsmith.stages.lock import read_lock, write_lock
from weightsmith.stages.quantize import model_config
from weightsmith.stages.render import portable
from weightsmith.stages.trial import Asked, Trial
from weightsmith.values import LORA, Artifact, Checkpoint, Score, ServingConfig, Sources


def check_layer_sizes(request: BuildRequest, sources: Sources) -> None:
    """Refuse, before the work, weights that will not fit a layer, as far as that can be told.

    Raises UsageError. What is pushed in the end is checked by its true sizes.
    """
    recipe, tree = request.file.recipe, sources.base.tree
    own = parse_size(recipe.image.max_layer_size) if recipe.image.max_layer_size else 0
    limits = limits_of(Reference.parse(reference(recipe, "x")).registry)
    theirs = limits.largest_layer if limits and request.outputs.push else 0
    for target in request.targets:
        if target.format.suffix == ".gguf":
            size = estimated_bytes(tree.weight_bytes, target.format, model_config(tree.root))
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
    registry: Registry,
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
            bases_of(request, target, device, registry, replace(tools, progress=Silent()))


def bases_of(
    request: BuildRequest, target: Target, device: str, registry: Registry, tools: Tools
) -> tuple[str, tuple[Image, ...]]:
    """Return a base's name, and its image for each platform as the lock pins it; pin what is new.

    Raises UsageError for a platform that the base is not there for, InputRefused where it is gone
    or another engine's, EnvironmentFailure where it is out of reach.
    """
    wanted = request.file.recipe.image
    name = base_reference(target.engine, device, wanted.base)
    lock = read_lock(request.file)
    known = lock.bases.get(name, {})
    pins = {} if request.update_lock else known
    try:
        bases = base_images(
            name, target.engine.name, registry, tools, pins=pins, platforms=wanted.platforms
        )
    except InputRefused as error:
        hint = f"; it is {lock.path} that pins it, and --update-lock takes {name} as it is now"
        raise InputRefused(error.message, hint=error.hint + (hint if pins else "")) from None
    pinned = lock
    for base in bases:
        if (was := known.get(base.platform, base.digest)) != base.digest:
            tools.progress.warn(f"{name}, by --update-lock: {was} before, now {base.digest}")
        pinned = pinned.with_base(name, base)
    write_lock(lock, pinned, tools.progress)
    return name, bases


@dataclass(frozen=True, slots=True, kw_only=True)
class Baking:
    """All that the images of one target are made of, but for their scores."""

    request: BuildRequest
    target: Target
    sources: Sources
    artifact: Artifact
    """As quantized, or as merged."""
    split: Resharded
    """The same with its large files cut, where the recipe says how large a layer may be."""
    config: ServingConfig
    bases: tuple[Image, ...]
    """One for each platform."""
    base_name: str
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
        """Bring the base for each platform as the lock pins it, and put them beside the rest.

        Raises UsageError for a platform that the base is not there for, and where a file cannot
        be cut to the size that a layer may have.
        """
        wanted = request.file.recipe.image
        name, bases = bases_of(request, target, str(config.plan["device"]), registry, tools)
        largest = parse_size(wanted.max_layer_size) if wanted.max_layer_size else 0
        split = Resharded(artifact.tree, {})
        return cls(
            request=request,
            target=target,
            sources=sources,
            artifact=artifact,
            split=reshard(artifact.tree, largest, tools.store.memo) if largest else split,
            config=config,
            bases=bases,
            base_name=public_base(name),
            tools=tools,
        )

    @property
    def base(self) -> Image:
        """The base for this machine, else the first."""
        return next((base for base in self.bases if is_own(base)), self.bases[0])

    @property
    def served(self) -> Artifact:
        """The files as they lie in the image."""
        return replace(self.artifact, tree=self.split.tree)

    def own(self, scores: Mapping[str, Score]) -> Image:
        """Return the image that can be started here.

        Raises UsageError where the registry that it is for will not take one of its layers.
        """
        image = self._image(self.base, scores)
        if self.request.outputs.push:
            place = Reference.parse(reference(self.request.file.recipe, self.target.name))
            check_layers([(x.file or x.digest.short, x.size) for x in image.layers], place.registry)
        return image

    def whole(self, scores: Mapping[str, Score]) -> Whole:
        """Return the image, or one for each platform; scores become labels of each."""
        return whole_of([self._image(base, scores) for base in self.bases])

    def _image(self, base: Image, scores: Mapping[str, Score]) -> Image:
        plan, recipe = portable(self.config.plan), self.request.file.recipe
        said = labels(recipe, self.sources, self.served, self.config, plan)
        wanted = recipe.image
        return bake(
            self.served,
            self.config,
            base=base,
            base_name=self.base_name,
            engine_version=engine_version(base),
            labels={ENGINE_LABEL: self.target.engine.name, **said, **score_labels(scores)},
            store=self.tools.store,
            model_dir=self.target.engine.model_dir,
            order=wanted.order,
            largest=parse_size(wanted.max_layer_size) if wanted.max_layer_size else 0,
            contents=self.split.contents,
        )

    def made(
        self, checkpoint: Checkpoint, scores: Mapping[str, Score], registry: Registry
    ) -> tuple[ImageMaterials, ...]:
        """Return what each platform's image was made of, for those who will ask."""
        recipe, format_ = self.request.file.recipe, self.artifact.format
        return tuple(
            ImageMaterials(
                image=self._image(base, scores),
                artifact=self.artifact,
                served=self.served,
                base=base,
                base_name=self.base_name,
                name=recipe.name,
                version=recipe.version,
                parameters={"target": self.target.name, "recipe": public_recipe(recipe)},
                sources=self.sources,
                checkpoint=checkpoint,
                recipe=recipe,
                quantizer_builder=of_format(format_.name).builder if format_.packed else "",
                scores=scores,
                network_in_jobs=network_in_jobs(checkpoint, self.artifact, self.tools),
                base_bills=bills_of(self.base_name, base, registry),
            )
            for base in self.bases
        )

    def trial(self, results: Sequence[Result]) -> Trial:
        """Return what the image is asked, and what its answers depend on."""
        return Trial(
            artifact=self.artifact,
            config=self.config,
            base=self.base.digest,
            asked=tuple(self._asked(result) for result in results),
            memory_bytes=int(self.config.plan["memory_limit_bytes"]),
            port_variable=self.target.engine.port_variable,
            host_variable=self.target.engine.host_variable,
            threads_variable=self.target.engine.threads_variable,
            neutral=self.target.engine.neutral_settings,
        )

    def _asked(self, result: Result) -> Asked:
        """Return a task with the adapter that is to answer it, where the image serves several."""
        task, number, engine = result.tried.task, result.tried.adapter, self.target.engine
        if self.target.format != LORA or number is None or len(self.sources.adapters) == 1:
            return Asked(task=task, ends=result.ends)
        if engine.numbers_adapters:
            alone = {"lora": [{"id": number, "scale": 1.0}]}
            return Asked(task=task, ends=result.ends, fields=alone)
        served = unmerged_adapters(self.request.file, self.target, self.sources)
        return Asked(task=task, ends=result.ends, model=served[number].name)
