"""What is kept of each target, passed or refused: build.json, the report, the rendered files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from weightsmith.build_record import StageRecord, read_build
from weightsmith.evaluating import subjects as references
from weightsmith.evaluating.results import Result, main_scores, unproven_of, verdict_of
from weightsmith.oci.image import Image
from weightsmith.planning.images import network_in_jobs
from weightsmith.planning.options import quantize_options, texts_of
from weightsmith.planning.request import BuildRequest
from weightsmith.planning.tasks import probes
from weightsmith.quality.result import Quality
from weightsmith.serving.plan import ServingConfig
from weightsmith.serving.targets import Target
from weightsmith.stages import cache_scales
from weightsmith.stages import merge as merging
from weightsmith.stages import publish as publishing
from weightsmith.stages import quantize as quantizing
from weightsmith.stages import validate as validating
from weightsmith.stages.evaluate import checks_of, takes_pictures
from weightsmith.stages.record import Facts, write_record
from weightsmith.stages.report import write_report
from weightsmith.starting import why_not_started
from weightsmith.tools import Tools
from weightsmith.validating.result import Validation
from weightsmith.values import Artifact, Checkpoint, Form, Json, Published, Scores, Sources


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """One finished target."""

    target: Target
    published: Published
    forms: Mapping[str, Form]
    """What else was published, by kind."""
    results: tuple[Result, ...]
    stages: Mapping[str, StageRecord]
    report: Path
    started: str = ""
    """The platform whose image was started and tested; "" if none was."""

    @property
    def scores(self) -> Scores:
        """The scores of the first task; empty without any."""
        return main_scores(self.results)

    @property
    def sameness(self) -> Mapping[str, float]:
        """Share of the first task's answers that are the reference's to the letter, by subject."""
        found = self.results[0].sameness if self.results else {}
        return {who: same.share for who, same in found.items()}

    @property
    def unproven(self) -> tuple[str, ...]:
        """Why passing shows nothing, for each task of which that is so."""
        return unproven_of(self.results)

    @property
    def verdict(self) -> str:
        """`passed`, or `not proven` if the gate could not have failed."""
        return verdict_of(self.results)


@dataclass(frozen=True, slots=True)
class Record:
    """What is written down of a target, as far as it came, or of a merge without any."""

    request: BuildRequest
    sources: Sources
    checkpoint: Checkpoint
    tools: Tools
    validation: Validation | None = None
    target: Target | None = None
    artifact: Artifact | None = None
    quality: Quality | None = None
    config: ServingConfig | None = None
    image: Image | None = None

    @property
    def started(self) -> str:
        """The platform of the image that was started; "" if none was."""
        startable = self.image and not why_not_started(self.image, self.tools)
        return self.image.platform if self.image and startable else ""

    def keep(
        self,
        published: Published,
        forms: Mapping[str, Form],
        results: tuple[Result, ...],
        stages: Mapping[str, StageRecord],
    ) -> Built:
        """Write build.json, the report and the rendered files of a target that passed."""
        if self.target is None:
            raise AssertionError("only a target is published")
        folder = self.request.folder(self.target)
        report = self._write(published, results, stages, folder, "", forms)
        return Built(
            target=self.target,
            published=published,
            forms=forms,
            results=results,
            stages=stages,
            report=report,
            started=self.started,
        )

    def names(self, published: Published) -> bool:
        """Return whether the build.json that is there names this image already."""
        try:
            image = read_build(self.request.folder(self.target)).image if self.target else None
        except (OSError, ValueError):
            return False
        place = (published.reference, published.digest)
        return image is not None and (image.reference, image.digest) == place

    def refuse(
        self, results: tuple[Result, ...], stages: Mapping[str, StageRecord], why: str
    ) -> Path:
        """Write the same of what did not pass, apart, and forget its image; return the report.

        Apart, because the record of an earlier image that passed belongs to that image.
        """
        if self.target is None:
            folder = self.request.dist.joinpath(
                self.request.file.recipe.name, self.request.file.recipe.version, "refused"
            )
            return self._write(None, results, stages, folder, why)
        folder = self.request.folder(self.target) / "refused"
        if self.image is None:
            return self._write(None, results, stages, folder, why)
        layout = self.request.candidate_layout(self.target)
        publishing.discard_candidate(self.image, layout, self.tools)
        unpublished = Published(reference="", digest=self.image.digest, layers=())
        return self._write(unpublished, results, stages, folder, why)

    def _write(
        self,
        published: Published | None,
        results: tuple[Result, ...],
        stages: Mapping[str, StageRecord],
        folder: Path,
        refused: str,
        forms: Mapping[str, Form] = MappingProxyType({}),
    ) -> Path:
        facts = Facts(
            recipe=self.request.file.recipe,
            sources=self.sources,
            checkpoint=self.checkpoint,
            validation=self.validation,
            target=self.target.name if self.target else "",
            artifact=self.artifact,
            quality=self.quality,
            config=self.config,
            published=published,
            forms=forms,
            results=results,
            checks=checks_of(self.image.digest, self.tools) if self.image else (),
            started=self.started,
            takes_pictures=bool(self.artifact and takes_pictures(self.artifact)),
            stages=stages,
            refused=refused,
            verdict="failed" if refused else verdict_of(results),
            unproven=() if refused else unproven_of(results),
            warnings=tuple(getattr(self.tools.progress, "warnings", ())),
            inputs=self._inputs(results),
            network_in_jobs=network_in_jobs(self.checkpoint, self.artifact, self.tools),
            memory_bytes=self.tools.memory.limit,
        )
        return write_report(write_record(facts, folder), folder, anew=False).html

    def _inputs(self, results: tuple[Result, ...]) -> Mapping[str, Json]:
        """Return what each cached stage depended on."""
        recipe, sources = self.request.file.recipe, self.sources
        found: dict[str, Json] = {}
        if self.checkpoint.digest != sources.base.digest:
            found["merge"] = merging.inputs(sources, recipe.merge).inputs
        if self.validation:
            asked_with = probes(self.request.file)
            found["validate"] = validating.inputs(
                sources, recipe.merge, self.checkpoint.digest, asked_with
            ).inputs
        for result in results[:1]:
            asked = references.subjects(sources, result.task.adapter)
            subject = asked.get("adapter", asked["base"])
            found["reference"] = references.inputs(subject, result.task.task).inputs
        if self.artifact and self.artifact.format.packed:
            wanted = quantize_options(
                self.request.file, self.artifact.format, sources.base, self.tools
            )
            found["quantize"] = quantizing.inputs(self.checkpoint.digest, wanted).inputs
        if self.artifact and self.artifact.tree.has(cache_scales.FILE):
            texts = texts_of(self.request.file)
            found["cache-scales"] = cache_scales.inputs(self.checkpoint.digest, texts).inputs
        return found
