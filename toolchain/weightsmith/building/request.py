"""The options of a build."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from weightsmith.core.errors import UsageError
from weightsmith.core.values import JsonValue
from weightsmith.evaluating.bench_files import ResultsFile
from weightsmith.evaluating.build_record import AutoRecord, CandidateRecord
from weightsmith.evaluating.candidacy import Candidacy
from weightsmith.merging.combining.combination import SUMS
from weightsmith.recipe.file import RecipeFile
from weightsmith.recipe.schema import ADAPTER, LOADABLE
from weightsmith.serving.targets import Target
from weightsmith.stages.publish import has_gguf
from weightsmith.stages.upload import HubDestination, repository_of
from weightsmith.steps.lock import pinned, read_lock
from weightsmith.steps.outputs import ImageOutputs
from weightsmith.steps.served_adapters import adapter_forms
from weightsmith.steps.step import TargetBuild
from weightsmith.steps.thin import THIN, check_thin


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """The candidate of `auto` that a build tries."""

    candidacy: Candidacy
    price: int
    """Foreseen bytes of its weights."""
    foreseen_speed: float
    """Tokens per second that the memory's bandwidth allows; 0 if size is preferred."""
    options: Mapping[str, JsonValue]
    """What it has of `quantize` beside the recipe's own."""
    began: float
    """By the tools' clock."""
    tried: AutoRecord
    """With the candidates that were left before."""
    rest: tuple[CandidateRecord, ...]
    """Those that are not tried if this one is proven."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildRequest:
    """A recipe, the targets to build, and where results go."""

    file: RecipeFile
    targets: tuple[Target, ...]
    outputs: ImageOutputs
    dist: Path
    """Results go to NAME/VERSION/TARGET/ in this folder."""
    engine_answers: bool
    """Start images in the container engine; if false, from a layout."""
    locked: bool = False
    """Refuse sources that differ from the recipe's lock."""
    bench_results: tuple[ResultsFile, ...] = ()
    """What other tools measured of the image."""
    update_lock: bool = False
    """Pin sources and bases again."""
    keep_replay: bool = False
    """Write the image's replay set beside the recipe."""
    auto: bool = False
    """Choose one more target, by the recipe's `auto`."""
    choice: Attempt | None = None
    """The candidate that the only target is, if `auto` tries it."""
    beside: bool = False
    """Whether another build of the same command has the same outputs."""

    @property
    def _has_several(self) -> bool:
        return self.beside or len(self.targets) + self.auto > 1

    def folder(self, target: Target) -> Path:
        """Return the folder for a target's results."""
        recipe = self.file.recipe
        return self.dist / recipe.name / recipe.version / target.name

    def outputs_of(self, target: Target) -> ImageOutputs:
        """Return the outputs of one target's image.

        A recipe that lists `thin` and not `image` pushes the thin image alone.
        """
        kinds = self.file.recipe.outputs.kinds
        alone = "image" not in kinds and THIN in self.forms_of(target)
        return self._outputs(target, push=self.outputs.push and not alone)

    def _outputs(self, target: Target, *, push: bool) -> ImageOutputs:
        """Return outputs; of several targets, each gets its own layout folder."""
        layout, load = self.outputs.layout, self.outputs.load
        if layout is not None and self._has_several:
            layout = layout / target.name
        if not (layout or load or push):
            layout = None if self.engine_answers else self.folder(target) / "image"
            load = self.engine_answers
        return replace(self.outputs, load=load, layout=layout, push=push)

    def forms_of(self, target: Target) -> tuple[str, ...]:
        """Return the kinds to publish of a target beside the image, each once.

        Only a target with merged weights in one GGUF file has one for Ollama, only one whose image
        can merge again has a thin one, and only adapters that were tested alone have their own.
        Raises UsageError if one of these is wanted and no target has it.
        """
        recipe = self.file.recipe
        kinds: list[str] = [k for k in dict.fromkeys(recipe.outputs.kinds) if k != "image"]
        if THIN in kinds and (fault := self._no_thin(target)):
            if all(map(self._no_thin, self.targets)):
                raise fault
            kinds.remove(THIN)
        if ADAPTER in kinds:
            kinds.remove(ADAPTER)
            kinds += self._adapter_forms(target)
        if "ollama" not in kinds or has_gguf(target):
            quantize = recipe.quantize
            if "ollama" in kinds and (quantize.split_max_size or quantize.shared_layers):
                key = "split_max_size" if quantize.split_max_size else "shared_layers"
                raise UsageError(
                    f"outputs: Ollama takes a model of one GGUF file, and quantize.{key} splits it",
                    hint="leave one of the two out",
                )
            return tuple(kinds)
        if not any(map(has_gguf, self.targets)):
            raise UsageError(
                f"outputs: Ollama takes merged weights as GGUF, and {target.name} has none",
                hint="build a target such as llamacpp-q4_k_m, or leave the kind ollama out",
            )
        return tuple(kind for kind in kinds if kind != "ollama")

    def _no_thin(self, target: Target) -> UsageError | None:
        merges = bool(self.file.recipe.adapters)
        try:
            check_thin(target.engine, target.format, merges=merges)
        except UsageError as error:
            return error
        return None

    def _adapter_forms(self, target: Target) -> tuple[str, ...]:
        """Return the adapters' own artifacts; raises UsageError for adapters not tested alone.

        Of several that are merged, none was; another target of the build may serve each by itself.
        """
        recipe = self.file.recipe
        changed = recipe.merge.method not in SUMS and not target.format.unmerged
        why = ""
        if not recipe.adapters:
            why = "the recipe has none"
        elif any(one.weight != 1.0 for one in recipe.adapters):
            why = "it was tested with a weight, which the artifact would not have"
        elif changed:
            why = f"{recipe.merge.method} changes an adapter before it is tested"
        elif len(recipe.adapters) > 1 and not target.format.unmerged:
            if any(one.format.unmerged for one in self.targets):
                return ()
            why = f"{target.name} merges {len(recipe.adapters)} adapters, so none is tested alone"
        forms = adapter_forms(recipe)
        if len(set(forms)) < len(forms):
            why = "two have one name; give them different versions"
        if why:
            raise UsageError(
                f"outputs: no adapter can be published by itself: {why}",
                hint="leave the kind adapter out, or build a target that serves adapters unmerged,"
                " such as vllm-lora",
            )
        return forms

    def hub_of(self, target: Target) -> HubDestination | None:
        """Return where on a hub a target's weights go; None if nowhere.

        Raises UsageError for a name that is no repository or that two targets would share.
        """
        wanted = self.file.recipe.outputs
        if not wanted.hub:
            return None
        name = repository_of(wanted.hub.replace("{target}", target.name))
        if not self.outputs.push:
            return None
        if self._has_several and "{target}" not in wanted.hub:
            raise UsageError(
                f"outputs.hub {wanted.hub}: several targets would share it",
                hint=f"write outputs.hub: {wanted.hub}-{{target}}, or build one --target",
            )
        if target.format.unmerged:
            raise UsageError(
                f"outputs.hub: {target.name} serves adapters beside their base, so it has no merged"
                " model to publish",
                hint="build another --target, or leave outputs.hub out",
            )
        return HubDestination(repository=name, force=self.outputs.force, public=wanted.public)

    def outputs_of_form(self, target: Target, kind: str) -> ImageOutputs:
        """Return where another kind of the same weights goes: beside the target's image.

        Container engines cannot load every kind; without another output, those are layouts.
        """
        outputs = self._outputs(target, push=self.outputs.push)
        layout = outputs.layout and outputs.layout.with_name(f"{outputs.layout.name}-{kind}")
        load = outputs.load and kind in LOADABLE
        if not (layout or load or outputs.push):
            layout = self.folder(target) / f"image-{kind}"
        return replace(outputs, load=load, layout=layout)

    def pinned(self) -> BuildRequest:
        """Return the request with the lock's pins for sources that the recipe does not pin."""
        if self.update_lock:
            return self
        return replace(self, file=pinned(self.file, read_lock(self.file)))

    def of(self, target: Target) -> TargetBuild:
        """Return one target with the places of its results."""
        folder, outputs = self.folder(target), self.outputs_of(target)
        return TargetBuild(
            file=self.file,
            target=target,
            folder=folder,
            outputs=outputs,
            candidate_layout=None if self.engine_answers else outputs.layout or folder / "image",
            update_lock=self.update_lock,
        )
