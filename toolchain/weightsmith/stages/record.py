"""Writes build.json: each digest, parameter, time and score of one target."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from weightsmith import __version__
from weightsmith.build_record import (
    FILE,
    NO_TASK,
    AdapterRecord,
    AnsweredTask,
    ArtifactRecord,
    BuildRecord,
    CheckRecord,
    ImageRecord,
    LayerRecord,
    MergeRecord,
    SamenessRecord,
    ScoreRecord,
    SourceRecord,
    StageRecord,
    TaskRecord,
    VerdictRecord,
    read_build,
)
from weightsmith.errors import EnvironmentFailure
from weightsmith.evaluating.sameness import Sameness
from weightsmith.evaluating.statistics import wilson
from weightsmith.files import write_whole
from weightsmith.provenance.evaluation import side_by_side
from weightsmith.provenance.labels import without_secrets
from weightsmith.quality.result import Quality
from weightsmith.recipe import Recipe
from weightsmith.serving.plan import ServingConfig
from weightsmith.validating.result import Validation
from weightsmith.values import (
    Artifact,
    Checkpoint,
    Json,
    Published,
    Score,
    Scores,
    Snapshot,
    Sources,
    without_passwords,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskFacts:
    """One task with its answers and scores."""

    name: str
    metric: str
    max_drop: float
    sample_of: int
    """Questions in the data, if only a sample was asked, else 0."""
    scores: Scores
    sameness: Mapping[str, Sameness]
    verdicts: tuple[Mapping[str, Json], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a target is recorded with, as far as it came, or a merge that none was made of."""

    recipe: Recipe
    sources: Sources
    checkpoint: Checkpoint
    validation: Validation | None
    target: str
    """Its name; empty where a merge was refused before there was any."""
    artifact: Artifact | None
    quality: Quality | None
    config: ServingConfig | None
    published: Published | None
    forms: Mapping[str, Published]
    """What else was published, by kind."""
    tasks: tuple[TaskFacts, ...]
    checks: Sequence[Mapping[str, Json]]
    """The checks of the started image, and their results."""
    stages: Mapping[str, StageRecord]
    verdict: str
    """`passed`, `not proven` or `failed`."""
    unproven: tuple[str, ...]
    """Why passing shows nothing."""
    refused: str
    """Why the image was not published; "" if it was."""
    warnings: tuple[str, ...]
    inputs: Mapping[str, Json]
    """Stage -> inputs of its result, so that the next plan can say what changed."""
    network_in_jobs: bool = False
    """Whether any job had network access, because the user allowed it."""
    memory_bytes: int = 0
    """Memory limit of every job."""


def write_record(facts: Facts, folder: Path) -> BuildRecord:
    """Write build.json and the rendered files into a folder; return what build.json says.

    Each file is replaced atomically. Raises EnvironmentFailure if that fails.
    """
    record = build_record(facts)
    files = facts.config.files if facts.config else {}
    write_files({**files, FILE: json.dumps(record.to_json(), indent=2) + "\n"}, folder)
    return record


def is_written(files: Mapping[str, str], folder: Path) -> bool:
    """Return whether a folder already has these texts from an earlier build."""
    try:
        return all((folder / name).read_text("utf-8") == text for name, text in files.items())
    except (OSError, ValueError):
        return False


def layers_in(folder: Path) -> tuple[str, ...]:
    """Return the layers of the image recorded in a folder, bottom first; () if there is none."""
    try:
        image = read_build(folder).image
    except (OSError, ValueError):
        return ()
    return tuple(layer.digest for layer in image.layers) if image else ()


def write_files(files: Mapping[str, str], folder: Path) -> None:
    """Write texts to a folder, each atomically; raises EnvironmentFailure."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            write_whole(folder / name, text.encode())
    except OSError as error:
        raise EnvironmentFailure(
            f"cannot write results to {folder}: {error.strerror}",
            hint="check the folder's permissions and the free space on its disk",
        ) from None


def build_record(facts: Facts) -> BuildRecord:
    """Return the content of a target's build.json."""
    recipe, first = facts.recipe, facts.tasks[0] if facts.tasks else None
    return BuildRecord(
        name=recipe.name,
        version=recipe.version,
        target=facts.target,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        base=SourceRecord(**_source(facts.sources.base)),
        adapters=tuple(
            AdapterRecord(
                **_source(adapter.snapshot),
                version=adapter.version,
                run_id=without_passwords(adapter.run_id),
                weight=adapter.weight,
            )
            for adapter in facts.sources.adapters
        ),
        merge=_merge(facts),
        validation=facts.validation,
        artifact=_artifact(facts.artifact) if facts.artifact else None,
        quality=facts.quality,
        plan=facts.config.plan.to_json() if facts.config else None,
        image=_image(facts.published) if facts.published else None,
        forms={kind: _image(form) for kind, form in facts.forms.items()},
        task=_task(first) if first else NO_TASK,
        scores=_scores(first) if first else {},
        verdicts=_verdicts(first) if first else (),
        items=tuple(side_by_side(first.scores)) if first else (),
        sameness=_sameness(first) if first else {},
        more_tasks=tuple(
            AnsweredTask(
                name=task.name,
                task=_task(task),
                scores=_scores(task),
                verdicts=_verdicts(task),
                items=tuple(side_by_side(task.scores)),
                sameness=_sameness(task),
            )
            for task in facts.tasks[1:]
        ),
        checks=tuple(CheckRecord.from_json(check) for check in facts.checks),
        stages=facts.stages,
        inputs=facts.inputs,
        verdict=facts.verdict,
        unproven=facts.unproven,
        refused=facts.refused,
        warnings=facts.warnings,
        network_in_jobs=facts.network_in_jobs,
        memory_bytes=facts.memory_bytes,
        recipe=without_secrets(recipe.model_dump(mode="json", exclude_defaults=True)),
        reproduce=tuple(_reproduce(facts)),
        next=tuple(_next(facts)),
    )


def _source(snapshot: Snapshot) -> dict[str, Any]:
    return {
        "source": snapshot.source,
        "pin": snapshot.pin,
        "digest": snapshot.digest,
        "files": snapshot.tree.files,
    }


def _merge(facts: Facts) -> MergeRecord:
    merged = facts.checkpoint.details
    return MergeRecord(
        **asdict(facts.recipe.merge),
        digest=facts.checkpoint.digest,
        tensors=merged.get("tensors", {}),
        findings=tuple(merged.get("findings", ())),
        repairs=merged.get("repairs", {}),
        shards=tuple(merged.get("shards", ())),
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


def _image(published: Published) -> ImageRecord:
    return ImageRecord(
        reference=published.reference,
        digest=published.digest,
        layers=tuple(LayerRecord(**asdict(layer)) for layer in published.layers),
        uploaded_bytes=published.uploaded_bytes,
        mounted=published.mounted,
    )


def _task(task: TaskFacts) -> TaskRecord:
    return TaskRecord(
        name=task.name, metric=task.metric, max_drop=task.max_drop, sample_of=task.sample_of
    )


def _scores(task: TaskFacts) -> dict[str, ScoreRecord]:
    return {
        name: ScoreRecord(score=s.score, n=s.n, metric=s.metric, interval=_interval(s))
        for name, s in task.scores.items()
    }


def _verdicts(task: TaskFacts) -> tuple[VerdictRecord, ...]:
    return tuple(VerdictRecord.from_json(dict(verdict)) for verdict in task.verdicts)


def _sameness(task: TaskFacts) -> dict[str, SamenessRecord]:
    return {who: SamenessRecord.from_json(dict(s.facts)) for who, s in task.sameness.items()}


def _interval(score: Score) -> tuple[float, float]:
    low, high = wilson(round(score.score * score.n), score.n)
    return round(low, 6), round(high, 6)


def _reproduce(facts: Facts) -> list[str]:
    """Return the command that reproduces the digest, with the pins of its sources."""
    sources = [("base", facts.sources.base)]
    sources += [("adapter", adapter.snapshot) for adapter in facts.sources.adapters]
    target = f" --target {facts.target}" if facts.target else ""
    lines = [f"# weightsmith {__version__}"]
    lines += [f"# {kind} {source.source}: {source.pin}" for kind, source in sources]
    lines.append(f"invoke build --recipe recipe.yaml{target}")
    if facts.published:
        lines.append(f"# image {facts.published.digest}")
    return lines


def _next(facts: Facts) -> list[str]:
    reference = facts.published.reference if facts.published else ""
    port = facts.config.port if facts.config else 0
    if not reference:
        return [
            "raise the quality (a larger format, a better adapter) or max_drop, and build again"
        ]
    if reference.startswith("oci:"):
        return [f"skopeo copy {reference} docker-daemon:{facts.recipe.name}:latest"]
    return [
        f"docker run --rm -p 127.0.0.1:{port}:{port} {reference}",
        f"curl http://127.0.0.1:{port}/v1/models",
    ]
