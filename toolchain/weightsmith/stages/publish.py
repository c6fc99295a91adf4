"""Images -> Published: the tested image and the other kinds of its weights get their names.

All forms' tags are looked at before any is published, so a build publishes all of them or none
because of a tag.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from weightsmith.core.values import Artifact, Published, Sources
from weightsmith.oci.image import host_image
from weightsmith.oci.manifests import OLLAMA_MODEL, OLLAMA_PROJECTOR
from weightsmith.oci.modelpack import modelfile
from weightsmith.oci.references import Reference
from weightsmith.provenance.attest import ImageMaterials, evidence, index_of_materials
from weightsmith.provenance.bills import base_documents
from weightsmith.provenance.labels import reference
from weightsmith.serving.memory import human
from weightsmith.serving.targets import Target
from weightsmith.steps.destinations import write_files
from weightsmith.steps.outputs import (
    ImageOutputs,
    deliver,
    describe,
    discard_candidate,
    is_held,
)
from weightsmith.steps.stage_result import StageResult, Timer, unrecorded
from weightsmith.steps.step import (
    NOT_YET,
    Foreseen,
    ForeseenWeights,
    Foresight,
    Results,
    State,
    Step,
    TargetStep,
    UnforeseenStep,
)
from weightsmith.steps.thin import THIN
from weightsmith.steps.tools import Tools

Images = tuple[ImageMaterials, ...]
"""One for each platform."""


def publish(
    made: Sequence[ImageMaterials],
    name: str,
    outputs: ImageOutputs,
    tools: Tools,
    *,
    started_in: Path | None = None,
) -> StageResult[Published]:
    """Publish the image of each platform with its evidence, and delete the candidate.

    Does nothing if every output already has exactly this image. It always contacts the registry,
    and always rewrites a layout that it signs. `started_in` is the layout next to which the
    candidate was written, None for the engine. Raises what `deliver` raises.
    """
    timer = Timer("publish", name, tools)
    whole = index_of_materials(made)
    held = is_held(whole, name, outputs, tools)
    if held and not outputs.push and not (outputs.layout and tools.signer):
        discard_candidate(host_image(whole), started_in, tools)
        return timer.done(describe(whole, name, outputs), cached=True)
    if started_in is not None and outputs.layout is None:  # a layout that is not an output
        discard_candidate(host_image(whole), started_in, tools)
    attachments = [
        evidence(one, base_documents(one.base, one.inputs.base_name, tools.registry))
        for one in (made if outputs.layout or outputs.push else ())
    ]
    published = deliver(whole, name, outputs, attachments, tools)
    return timer.done(published, cached=held and not published.uploaded_bytes + published.mounted)


def has_gguf(target: Target) -> bool:
    """Return whether a target serves merged weights as GGUF."""
    return target.format.suffix == ".gguf" and not target.format.unmerged


@dataclass(frozen=True, eq=False, kw_only=True)
class PermitStep(UnforeseenStep[None]):
    """Checks, before anything is published, that no tag of a build already names something else."""

    name = "permit"
    before_publishing = True

    image: Step[Images, None]
    forms: tuple[tuple[str, Step[Images, None]], ...]
    pushed: tuple[str, ...]
    """Kinds that go to a registry."""

    def run(self, have: Results, tools: Tools) -> StageResult[None]:
        """Raise UsageError if a tag does; does nothing for an image that goes alone."""
        outputs, name = self.of.outputs, reference(self.file.recipe, self.target)
        pushed = {name: self.image} if outputs.push else {}
        pushed |= {f"{name}-{kind}": one for kind, one in self.forms if kind in self.pushed}
        if self.forms and not outputs.force:
            for tag, step in pushed.items():
                tools.registry.check_tag(
                    Reference.parse(tag), index_of_materials(have[step]).digest
                )
        return unrecorded(None)


@dataclass(frozen=True, eq=False, kw_only=True)
class PublishStep(TargetStep[Published, None]):
    """Publishes the tested image with its evidence."""

    name = "publish"
    in_every_plan = True
    publishes = True

    sources: Step[Sources, Sources]
    weights: Step[Artifact, ForeseenWeights]
    image: Step[Images, None]
    checked: Step[None, None]
    forms: tuple[tuple[str, Step[Images, None]], ...]
    """What else is published, by kind."""

    def foresee(self, seen: Foresight) -> Foreseen[None]:
        """Return its row: what is written, and what goes a second time for other kinds."""
        recipe, target, weights = self.file.recipe, self.of.target, seen[self.weights]
        served = seen[self.sources].adapters if target.format.unmerged else ()
        size = (weights.tree.size if weights.tree else weights.weight_bytes) + sum(
            one.snapshot.tree.size for one in served
        )
        why = "not known before the image is assembled" if weights.tree else NOT_YET
        # Other kinds share the weight layers; these have the same weights as a blob of its own.
        runners = ("modelpack", "ollama") if has_gguf(target) else ("modelpack",)
        plain = [kind for kind in runners if kind in recipe.outputs.kinds]
        if plain:
            again = f"the weights are uploaded a second time, {human(size)}, as plain files"
            why += f"; {' and '.join(plain)}: {again}"
            why += "" if "ollama" in plain else "; modelpack-tar would upload nothing more"
        if any(kind == THIN for kind, _ in self.forms):
            base, own = seen[self.sources].base.tree.size, seen[self.sources].adapters
            adapters = human(sum(one.snapshot.tree.size for one in own))
            shared = (
                "mounted" if recipe.outputs.mount_base else "that all fine-tunes of the base share"
            )
            why += f"; thin: {human(base)} {shared}, "
            why += f"{adapters} of its own"
        if hub := recipe.outputs.hub:
            why += f"; with --push, {human(size)} go to {hub} too, unless it has them"
        disk = 2 * size if plain else size
        written = disk + size if hub else disk
        row = self.row(State(cached=False, why=why), read=size, write=written, disk=disk)
        return Foreseen(value=None, rows=(row,))

    def run(self, have: Results, tools: Tools) -> StageResult[Published]:
        """Return where it is; raises what `publish` does."""
        of, name = self.of, reference(self.file.recipe, self.target)
        return publish(have[self.image], name, of.outputs, tools, started_in=of.candidate_layout)


@dataclass(frozen=True, eq=False, kw_only=True)
class PublishFormStep(UnforeseenStep[Published]):
    """Publishes another kind of the same weights, after the image, whose row has what it takes."""

    name = "publish-form"
    publishes = True

    kind: str
    outputs: ImageOutputs
    form: Step[Images, None]
    image: Step[Published, None]

    def run(self, have: Results, tools: Tools) -> StageResult[Published]:
        """Return where it is; for Ollama, write a Modelfile too."""
        made, name = have[self.form], f"{reference(self.file.recipe, self.target)}-{self.kind}"
        layout = self.outputs.layout
        found = publish(made, name, self.outputs, tools, started_in=layout).value
        if self.kind == "ollama":
            folder, places = self.of.folder, [name]
            if layout:  # where its GGUF files are, seen from the folder
                blobs = [
                    layout / "blobs" / "sha256" / layer.digest.hex
                    for layer in host_image(index_of_materials(made)).layers
                    if layer.media_type in (OLLAMA_MODEL, OLLAMA_PROJECTOR)
                ]
                places = [
                    f"./{blob.relative_to(folder)}" if blob.is_relative_to(folder) else str(blob)
                    for blob in blobs
                ]
            write_files({"Modelfile": modelfile(places, made[0].inputs.context)}, folder)
        return unrecorded(found)
