"""All that the images of one target are made of: one for each platform of its base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from weightsmith.building.artifacts import network_in_jobs
from weightsmith.checkpoints.reshard import Resharded, reshard
from weightsmith.evaluating.results import Result
from weightsmith.oci.image import Image
from weightsmith.oci.index import Whole, is_own, whole_of
from weightsmith.oci.limits import check_layers
from weightsmith.oci.references import Reference
from weightsmith.planning.bases import bases_of
from weightsmith.planning.options import unmerged_adapters
from weightsmith.planning.request import BuildRequest
from weightsmith.provenance.labels import labels, reference, score_labels
from weightsmith.quantizers import of_format
from weightsmith.serving.memory import parse_size
from weightsmith.serving.plan import ServingConfig
from weightsmith.serving.targets import Target
from weightsmith.stages.attest import ImageMaterials, public_recipe
from weightsmith.stages.bake import bake
from weightsmith.stages.base import (
    ENGINE_LABEL,
    bills_of,
    engine_version,
    public_base,
)
from weightsmith.stages.trial import Asked, Trial
from weightsmith.tools import Tools
from weightsmith.values import LORA, Artifact, Checkpoint, Score, Sources


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
        tools: Tools,
    ) -> Baking:
        """Bring the base for each platform as the lock pins it, and put them beside the rest.

        Raises UsageError for a platform that the base is not there for, and where a file cannot
        be cut to the size that a layer may have.
        """
        wanted = request.file.recipe.image
        name, bases = bases_of(request, target, config.plan.device, tools)
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
        recipe = self.request.file.recipe
        said = labels(recipe, self.sources, self.served, self.config)
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
        self, checkpoint: Checkpoint, scores: Mapping[str, Score]
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
                base_bills=bills_of(self.base_name, base, self.tools.registry),
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
            memory_bytes=self.config.plan.memory_limit_bytes,
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
