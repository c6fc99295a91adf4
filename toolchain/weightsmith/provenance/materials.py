"""What the images of a model are made of: their content, and the facts for their evidence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from weightsmith.core.errors import CacheLost, WeightsmithError
from weightsmith.core.values import Artifact, Checkpoint, JsonValue, Scores, Sources, Tree
from weightsmith.evaluating.results import Result, main_scores, unproven_of
from weightsmith.models.facts import ModelFacts, read_facts
from weightsmith.models.gguf_names import gguf_models
from weightsmith.models.reshard import Resharded
from weightsmith.oci.image import Image, ImageOrIndex, Order, index_of
from weightsmith.provenance.bills import license_of
from weightsmith.recipe.schema import Recipe
from weightsmith.serving.engine import Engine
from weightsmith.serving.plan import ServingConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageInputs:
    """A model, the process that serves it, and the base for each platform.

    Sources, checkpoint and recipe are known only in `build`, not in `bake`.
    """

    name: str
    version: str
    artifact: Artifact
    """As quantized, or as merged."""
    engine: Engine
    config: ServingConfig | None
    """None for an image that only holds weights, for other containers to mount."""
    bases: tuple[Image, ...]
    """One per platform; () for an image from scratch."""
    platforms: tuple[str, ...] = ()
    """The platforms of an image from scratch; () for `DEFAULT_PLATFORM` alone."""
    base_name: str
    """The base's name in the image's labels; "" for a folder on this machine."""
    kind: str = "image"
    """One of `recipe.KINDS`."""
    labels: Mapping[str, str]
    """All labels that do not follow from the other inputs."""
    order: Order = "engine-first"
    largest_layer: int | None = 0
    """Bytes; larger safetensors files are split. 0: no limit. None: by the model's size."""
    layers_below: int = 0
    """Layers of the base of the image whose layers this kind shares."""
    context: int = 0
    """Tokens that a runner should make room for; 0 for its own default."""
    parameters: Mapping[str, JsonValue]
    """What the user asked for, as the image's statement records it."""
    licensed: Tree | None = None
    """The model's folder, if the artifact lacks its licence files."""
    sources: Sources | None = None
    checkpoint: Checkpoint | None = None
    recipe: Recipe | None = None
    quantizer_builder: str = ""
    network_in_jobs: bool = False
    """Whether a job that made any of it had network access, because the user allowed it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageMaterials:
    """One platform's image and its materials."""

    inputs: ImageInputs
    split: Resharded
    """The artifact's files in the image: large ones may be split."""
    base: Image | None
    image: Image
    results: tuple[Result, ...] = ()
    """What the started image was tested with; () before it was."""
    stand_in: str = ""
    """Platform of the image that was started in place of this one; "" if there is none such."""

    @property
    def unproven(self) -> tuple[str, ...]:
        """Why its having passed shows nothing; () if it was started and shows something."""
        missing = f"it was not started: the image for {self.stand_in} was, with the same weights"
        return (*([missing] if self.stand_in else []), *unproven_of(self.results))

    @property
    def scores(self) -> Scores:
        """The scores of the first task."""
        return main_scores(self.results)

    @property
    def served(self) -> Artifact:
        """The artifact with the files that are in the image."""
        return replace(self.inputs.artifact, tree=self.split.tree)


def facts_of(tree: Tree) -> ModelFacts | None:
    """Return what a model is, by its folder or GGUF file; None if it cannot be read."""
    try:
        if tree.has("config.json"):
            return read_facts(tree.texts)
        names = gguf_models(file.path for file in tree.files)
        return read_facts(tree.header(names[0])) if names else None
    except CacheLost:
        raise  # the model could be read elsewhere
    except (OSError, ValueError, WeightsmithError):
        return None


def license_name(inputs: ImageInputs, tree: Tree) -> str:
    """Return the licence: by the recipe, else by the card of the model or of its base.

    An adapter's licence is the adapter's alone, and an engine's the engine's.
    """
    said = (inputs.recipe.card.license or inputs.recipe.base.license) if inputs.recipe else ""
    trees = (tree, *((inputs.sources.base.tree,) if inputs.sources else ()))
    return said or next(filter(None, (license_of(one.texts) for one in trees)), "")


def index_of_materials(made: Sequence[ImageMaterials]) -> ImageOrIndex:
    """Return the image of one platform, or the index of several."""
    return index_of([one.image for one in made])
