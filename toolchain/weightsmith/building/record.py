"""What is kept of each target, passed or refused: build.json, the report, the rendered files.

A new build.json that differs only in its date, the seconds of finding results and the limit of jobs
that did not run is not written: a record says when its build was last made. Writing it each time is
six waits for the disk for each cell of a fleet.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from shlex import quote

from weightsmith import __version__
from weightsmith.building.graph import BuildRun
from weightsmith.building.pipeline import BuildSteps, TargetSteps
from weightsmith.building.request import BuildRequest
from weightsmith.building.targets import AUTO
from weightsmith.core.errors import CheckFailed, WeightsmithError
from weightsmith.core.values import (
    Artifact,
    Form,
    Published,
    Scores,
    Snapshot,
    without_passwords,
)
from weightsmith.evaluating.build_record import (
    FILE,
    NO_TASK,
    AdapterRecord,
    ArtifactRecord,
    AutoRecord,
    BuildRecord,
    CandidateRecord,
    CheckRecord,
    ImageRecord,
    LayerRecord,
    MergeRecord,
    ReplayRecord,
    ScoreRecord,
    SequenceRecord,
    SourceRecord,
    StageRecord,
    SuiteRecord,
    TaskRecord,
    VerdictRecord,
    read_build,
    recorded,
)
from weightsmith.evaluating.candidacy import sequences
from weightsmith.evaluating.gate import score_interval
from weightsmith.evaluating.pages import write_report
from weightsmith.evaluating.results import (
    Result,
    main_scores,
    unproven,
    unproven_of,
    verdict_of,
    verdicts_of,
)
from weightsmith.evaluating.speed import Speed
from weightsmith.models.reshard import WeightBytes
from weightsmith.oci.image import Image, host_image
from weightsmith.provenance.attest import ReplayFile, index_of_materials, items_of
from weightsmith.provenance.bills import license_of
from weightsmith.provenance.labels import without_secrets
from weightsmith.serving.plan import ServingConfig
from weightsmith.serving.targets import Target
from weightsmith.stages.evaluate import checks_of, takes_pictures
from weightsmith.steps.destinations import write_files
from weightsmith.steps.outputs import discard_candidate, network_in_jobs
from weightsmith.steps.sharing import sharing
from weightsmith.steps.stage_result import unrecorded
from weightsmith.steps.step import AnyStep, Trial
from weightsmith.steps.tools import Tools

_REFUSED = "not published: "
_REPLAY = "replay.json"
"""Beside the record: the replay set of secret questions."""


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
    bench: Speed | None = None
    """How fast the image is; None if the recipe does not ask."""
    auto: AutoRecord | None = None
    """What it was chosen from, by `auto`."""

    @property
    def name(self) -> str:
        """The target as it was asked for: its name, or `auto`."""
        return AUTO if self.auto else self.target.name

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
    def sharing(self) -> WeightBytes | None:
        """How many bytes of its weights other images have too; None if there is no image yet."""
        if self.target is None or not (made := self.run.have.get(self.target.image)):
            return None
        inputs = made[0].inputs
        return sharing(made[0].split, inputs.artifact, inputs.apart)

    @property
    def replay(self) -> ReplayFile | None:
        """The image's replay set; None if it has none, or none yet."""
        made = self.run.have.get(self.target.labelled) if self.target else None
        return made[0].inputs.replay if made else None

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
    def auto(self) -> AutoRecord | None:
        """What `auto` has tried, then this target, and what is not tried; None if it was named."""
        if (choice := self.request.choice) is None:
            return None
        tried = choice.tried
        return replace(tried, candidates=(*tried.candidates, self.candidate(), *choice.rest))

    def candidate(self, stage: str = "", error: WeightsmithError | None = None) -> CandidateRecord:
        """Return what is known of a candidate, which was left at a stage for an error."""
        choice, have = self.request.choice, self.run.have
        if choice is None or self.target is None:
            raise AssertionError("only a candidate of `auto` is one")
        weights = have.get(self.target.weights)
        found = sequences(self.trial.results, choice.candidacy.level)
        details = error.details if error else {}
        asked = details.get("sequence", ())
        speed = self.trial.speed or choice.candidacy.speed or details.get("speed", 0.0)
        return CandidateRecord(
            target=self.target.of.target.name,
            options=choice.options,
            price=choice.price,
            size=weights.tree.size if weights else 0,
            stage=stage,
            left=error.message if error else "",
            seconds=round(self.tools.clock() - choice.began, 3),
            sequence=found or tuple(map(SequenceRecord.from_json, asked)),
            foreseen_speed=choice.foreseen_speed,
            speed=speed,
        )

    def keep(self) -> BuiltTarget:
        """Write build.json, the report and the rendered files of a target that passed."""
        published = self.published
        if self.target is None or published is None:
            raise AssertionError("only what was published is kept")
        of, trial = self.target.of, self.trial
        report = self._write(published, of.folder, "")
        return BuiltTarget(
            target=of.target,
            published=published,
            forms=self.forms,
            results=trial.results,
            stages=self.run.records(of),
            report=report,
            started=trial.started,
            bench=self.run.have.get(self.target.bench),
            auto=read_build(of.folder).auto if self.request.choice else None,
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

    def refusal(self, step: AnyStep, error: CheckFailed) -> CheckFailed:
        """Write the report of a check that failed; return its error with the report's path.

        What is written lies apart, because the record of an earlier image that passed belongs to
        that image. The image that was refused is forgotten.
        """
        have = self.run.have
        if have.get(self.steps.checkpoint) is None:
            return error
        self.tools.progress.warn(f"{_REFUSED}{error.message}")
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
        """Write build.json, the rendered files and the report; return the report's path.

        A record of a build that ran nothing stays as it is. Each file is replaced atomically.
        Raises EnvironmentFailure if that fails.
        """
        config = self.run.have.get(self.target.config) if self.target else None
        record = self._record(published, config, refused)
        files = config.files if config else {}
        if (replay := self.replay) and replay.secret and published:
            files = {**files, _REPLAY: replay.made.data.decode()}
        if earlier := recorded(folder, record):
            record = earlier
        else:
            files = {**files, FILE: json.dumps(record.to_json(), indent=2) + "\n"}
        write_files(files, folder)
        return write_report(record, folder, anew=False).html

    def _record(
        self, published: Published | None, config: ServingConfig | None, refused: str
    ) -> BuildRecord:
        have, target, trial, image = self.run.have, self.target, self.trial, self.image
        recipe, sources = self.request.file.recipe, have[self.steps.sources]
        checkpoint, artifact = have[self.steps.checkpoint], None
        if target:
            artifact = have.get(target.served) or have.get(target.weights)
        suites = _suites(trial.results)
        first = suites[0] if suites else None
        base, merged, served = sources.base, checkpoint.details, None
        if published:
            pictures = bool(artifact and takes_pictures(artifact))
            served = replace(_image(published), started=trial.started, takes_pictures=pictures)
        return BuildRecord(
            name=recipe.name,
            version=recipe.version,
            target=target.of.target.name if target else "",
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            base=_source(base, recipe.base.license),
            draft=_source(sources.draft, recipe.draft.license)
            if sources.draft and recipe.draft
            else None,
            adapters=tuple(
                AdapterRecord(
                    source=adapter.snapshot.source,
                    pin=adapter.snapshot.pin,
                    digest=adapter.snapshot.digest,
                    files=adapter.snapshot.tree.files,
                    license=license_of(adapter.snapshot.tree.texts),
                    version=adapter.version,
                    run_id=without_passwords(adapter.run_id),
                    weight=adapter.weight,
                )
                for adapter in sources.adapters
            ),
            merge=MergeRecord(
                **asdict(recipe.merge),
                digest=checkpoint.digest,
                tensors=merged.get("tensors", {}),
                findings=tuple(merged.get("findings", ())),
                repairs=merged.get("repairs", {}),
                shards=tuple(merged.get("shards", ())),
            ),
            validation=have.get(self.steps.validation),
            artifact=_artifact(artifact) if artifact else None,
            quality=have.get(target.quality) if target else None,
            plan=config.plan.to_json() if config else None,
            image=served,
            sharing=self.sharing,
            replay=_replay(self.replay),
            forms={} if refused else {kind: _image(form) for kind, form in self.forms.items()},
            task=first.task if first else NO_TASK,
            scores=first.scores if first else {},
            verdicts=first.verdicts if first else (),
            items=tuple(items_of(trial.results)),
            sameness=first.sameness if first else {},
            suites=suites,
            checks=tuple(
                map(CheckRecord.from_json, checks_of(image.digest, self.tools) if image else ())
            ),
            bench=have.get(target.bench) if target else None,
            auto=self.auto if target and not refused else None,
            stages=self.run.records(target.of if target else None),
            inputs={
                step.name: found.inputs
                for step, _ in have.outcomes(target.of if target else None)
                if (found := step.inputs(have, self.tools))
            },
            verdict="failed" if refused else verdict_of(trial.results),
            unproven=() if refused else unproven_of(trial.results),
            refused=refused,
            # What is left of `auto` has records of its own.
            warnings=tuple(
                text
                for text in dict.fromkeys(self.tools.progress.warnings)
                if refused or not text.startswith(_REFUSED)
            ),
            network_in_jobs=network_in_jobs(checkpoint, artifact, self.tools),
            memory_bytes=self.tools.memory.limit,
            recipe=without_secrets(recipe.model_dump(mode="json", exclude_defaults=True)),
            reproduce=tuple(self._reproduce(published)),
            next=tuple(self._next(published, config)),
        )

    def _reproduce(self, published: Published | None) -> Iterator[str]:
        """Yield the command that reproduces the digest, with the pins of its sources."""
        sources = self.run.have[self.steps.sources]
        yield f"# weightsmith {__version__}"
        yield f"# base {sources.base.source}: {sources.base.pin}"
        for one in sources.adapters:
            yield f"# adapter {one.snapshot.source}: {one.snapshot.pin}"
        if sources.draft:
            yield f"# draft {sources.draft.source}: {sources.draft.pin}"
        target = f" --target {self.target.of.target.name}" if self.target else ""
        yield f"invoke build --recipe recipe.yaml{target}"
        if published:
            yield f"# image {published.digest}"

    def _next(self, published: Published | None, config: ServingConfig | None) -> Iterator[str]:
        reference = published.reference if published else ""
        if not reference:
            better = "raise the quality (a larger format, a better adapter) or max_drop"
            yield f"{better}, and build again"
        elif reference.startswith("oci:"):
            name = self.request.file.recipe.name
            yield f"skopeo copy {quote(reference)} docker-daemon:{name}:latest"
        else:
            port, flags = (config.port, config.plan.docker_flags) if config else (0, ())
            words = ("docker run --rm", f"-p 127.0.0.1:{port}:{port}", *flags, reference)
            yield " ".join(words)
            yield f"curl http://127.0.0.1:{port}/v1/models"


def _replay(replay: ReplayFile | None) -> ReplayRecord | None:
    if replay is None:
        return None
    return ReplayRecord(
        digest=replay.made.digest,
        questions=len(replay.made.questions),
        reference=replay.made.reference,
        secret=replay.secret,
    )


def _source(snapshot: Snapshot, license_: str) -> SourceRecord:
    """Return a model that a build began with; its licence is the recipe's, or its card's."""
    return SourceRecord(
        source=snapshot.source,
        pin=snapshot.pin,
        digest=snapshot.digest,
        files=snapshot.tree.files,
        license=license_ or license_of(snapshot.tree.texts),
    )


def _artifact(artifact: Artifact) -> ArtifactRecord:
    details = {k: v for k, v in artifact.details.items() if k != "cached"}
    return ArtifactRecord(
        format=artifact.format.name,
        size=artifact.tree.size,
        bits_per_weight=details.get("bits_per_weight", artifact.format.bits_per_weight),
        file=max(artifact.tree.files, key=lambda file: file.size).path,
        digest=artifact.digest,
        files=artifact.tree.files,
        details=details,
    )


def _image(published: Form) -> ImageRecord:
    return ImageRecord(
        reference=published.reference,
        digest=published.digest,
        layers=tuple(LayerRecord(**asdict(layer)) for layer in published.layers),
        uploaded_bytes=published.uploaded_bytes,
        mounted=published.mounted,
        platforms=published.platforms if isinstance(published, Published) else {},
    )


def _suites(results: Sequence[Result]) -> tuple[SuiteRecord, ...]:
    """Return what is recorded of suites."""
    each = zip(results, verdicts_of(results), unproven(results), strict=True)
    return tuple(_suite(*one) for one in each)


def _suite(result: Result, verdict: str, reasons: tuple[str, ...]) -> SuiteRecord:
    task, rule = result.task.task, result.task.rule
    return SuiteRecord(
        name=task.name,
        task=TaskRecord(
            name=task.name,
            metric=task.metric,
            max_drop=rule.max_drop,
            against=rule.against,
            min_score=rule.min_score,
            sample_of=result.task.of,
            benchmark=result.task.settings.benchmark,
        ),
        scores={
            name: ScoreRecord(
                score=s.score,
                n=s.n,
                metric=s.metric,
                interval=(round(low, 6), round(high, 6)),
                graded=s.graded,
                figures=s.figures,
                carried=sum("carried" in row for row in s.per_item),
                bound=max((float(row.get("carried", 0)) for row in s.per_item), default=0.0),
            )
            for name, s in result.scores.items()
            for low, high in [score_interval(s)]
        },
        verdicts=tuple(VerdictRecord.from_json(dict(one.facts)) for one in result.verdicts),
        verdict=verdict,
        unproven=() if verdict == "failed" else reasons,
        sameness=result.sameness,
    )
