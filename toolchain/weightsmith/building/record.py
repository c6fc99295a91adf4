"""What is kept of each target, passed or refused: build.json, the report, the rendered files.

A new build.json that differs only in its date, the seconds of finding results and the limit of jobs
that did not run is not written: a record says when its build was last made. Writing it each time is
six waits for the disk for each cell of a fleet.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from weightsmith.building.graph import BuildRun
from weightsmith.building.pipeline import BuildSteps, TargetSteps
from weightsmith.building.record_facts import Facts, write_record
from weightsmith.building.request import BuildRequest
from weightsmith.core.errors import CheckFailed, WeightsmithError
from weightsmith.core.values import Form, Published, Scores, Writable
from weightsmith.evaluating.build_record import StageRecord, read_build
from weightsmith.evaluating.pages import write_report
from weightsmith.evaluating.results import Result, main_scores, unproven_of, verdict_of
from weightsmith.oci.image import Image, host_image
from weightsmith.provenance.materials import index_of_materials
from weightsmith.serving.targets import Target
from weightsmith.stages.evaluate import checks_of, takes_pictures
from weightsmith.steps.delivery import discard_candidate, network_in_jobs
from weightsmith.steps.stage_result import unrecorded
from weightsmith.steps.step import Step, Trial
from weightsmith.steps.tools import Tools


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltTarget:
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
        return {who: 1 - len(same.differences) / same.n for who, same in found.items()}

    @property
    def unproven(self) -> tuple[str, ...]:
        """Why passing shows nothing, for each task of which that is so."""
        return unproven_of(self.results)

    @property
    def verdict(self) -> str:
        """`passed`, or `not proven` if the gate could not have failed."""
        return verdict_of(self.results)


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What is written down of a target, or of the steps that all share, as far as they came."""

    request: BuildRequest
    steps: BuildSteps
    run: BuildRun
    tools: Tools
    target: TargetSteps | None = None

    @property
    def trial(self) -> Trial:
        """The scores so far: the image's, or those of the models that it is compared with."""
        for step in reversed(self.target.trials if self.target else ()):
            if found := self.run.have.get(step):
                return found
        return Trial(results=self.run.have.get(self.steps.expected) or ())

    @property
    def image(self) -> Image | None:
        """The image for this machine; None if there is none yet."""
        made = self.run.have.get(self.target.image) if self.target else None
        return host_image(index_of_materials(made)) if made else None

    @property
    def published(self) -> Published | None:
        """Where the image is; None until it was published."""
        return self.run.have.get(self.target.published) if self.target else None

    @property
    def forms(self) -> Mapping[str, Form]:
        """What else was published so far, by kind."""
        named = self.target.forms if self.target else ()
        found = {kind: self.run.have.get(step) for kind, step in named}
        return {kind: form for kind, form in found.items() if form}

    @property
    def forms_follow(self) -> bool:
        """Whether anything is published beside the image."""
        return bool(self.target and self.target.forms)

    def keep(self) -> BuiltTarget:
        """Write build.json, the report and the rendered files of a target that passed."""
        published = self.published
        if self.target is None or published is None:
            raise AssertionError("only what was published is kept")
        of, trial = self.target.of, self.trial
        return BuiltTarget(
            target=of.target,
            published=published,
            forms=self.forms,
            results=trial.results,
            stages=self.run.records(of),
            report=self._write(published, of.folder, ""),
            started=trial.started,
        )

    def names_published(self) -> bool:
        """Return whether the build.json that is there names the published image already."""
        if self.target is None or (published := self.published) is None:
            return False
        try:
            image = read_build(self.target.of.folder).image
        except (OSError, ValueError):
            return False
        place = (published.reference, published.digest)
        return image is not None and (image.reference, image.digest) == place

    def refusal(self, step: Step[object, object], error: CheckFailed) -> CheckFailed:
        """Write the report of a check that failed; return its error with the report's path.

        What is written lies apart, because the record of an earlier image that passed belongs to
        that image. The image that was refused is forgotten.
        """
        have = self.run.have
        if have.get(self.steps.checkpoint) is None:
            return error
        self.tools.progress.warn(f"not published: {error.message}")
        if found := step.failed(error):
            have.put(step, unrecorded(found))
        recipe = self.request.file.recipe
        folder = self.request.dist / recipe.name / recipe.version
        folder = (self.target.of.folder if self.target else folder) / "refused"
        unpublished = None
        if image := self.image:
            self.discard_candidate()
            unpublished = Published(reference="", digest=image.digest, layers=())
        report = self._write(unpublished, folder, error.message)
        hint = f"{error.hint}\nreport: {report}"
        return CheckFailed(error.message, hint=hint, details=error.details)

    def discard_candidate(self) -> None:
        """Forget the image that was started, if there is one."""
        if self.target and (image := self.image):
            with suppress(WeightsmithError):
                discard_candidate(image, self.target.of.candidate_layout, self.tools)

    def _write(self, published: Published | None, folder: Path, refused: str) -> Path:
        have, target, trial, image = self.run.have, self.target, self.trial, self.image
        checkpoint = have[self.steps.checkpoint]
        artifact = None
        if target:
            artifact = have.get(target.served) or have.get(target.weights)
        results = trial.results
        facts = Facts(
            recipe=self.request.file.recipe,
            sources=have[self.steps.sources],
            checkpoint=checkpoint,
            validation=have.get(self.steps.validation),
            target=target.of.target.name if target else "",
            artifact=artifact,
            quality=have.get(target.quality) if target else None,
            config=have.get(target.config) if target else None,
            published=published,
            forms={} if refused else self.forms,
            results=results,
            checks=checks_of(image.digest, self.tools) if image else (),
            started=trial.started,
            takes_pictures=bool(artifact and takes_pictures(artifact)),
            stages=self.run.records(target.of if target else None),
            refused=refused,
            verdict="failed" if refused else verdict_of(results),
            unproven=() if refused else unproven_of(results),
            warnings=tuple(self.tools.progress.warnings),
            inputs=dict(self._inputs()),
            network_in_jobs=network_in_jobs(checkpoint, artifact, self.tools),
            memory_bytes=self.tools.memory.limit,
        )
        return write_report(write_record(facts, folder), folder, anew=False).html

    def _inputs(self) -> Iterator[tuple[str, Mapping[str, Writable]]]:
        """Yield what each cached stage depended on, by its name."""
        of = self.target.of if self.target else None
        for step, _ in self.run.have.outcomes(of):
            if found := step.inputs(self.run.have, self.tools):
                yield step.name, found.inputs
