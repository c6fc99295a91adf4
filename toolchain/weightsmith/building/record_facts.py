"""Writes build.json: each digest, parameter, time and score of one target."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from shlex import quote
from typing import Any

from weightsmith import __version__
from weightsmith.core.values import (
    Artifact,
    Checkpoint,
    Form,
    JsonValue,
    Published,
    Score,
    Snapshot,
    Sources,
    Writable,
    without_passwords,
)
from weightsmith.evaluating.build_record import (
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
    ScoreRecord,
    SourceRecord,
    StageRecord,
    TaskRecord,
    VerdictRecord,
    recorded,
)
from weightsmith.evaluating.gate import wilson
from weightsmith.evaluating.results import Result
from weightsmith.provenance.attest import side_by_side
from weightsmith.provenance.bills import license_of
from weightsmith.provenance.labels import without_secrets
from weightsmith.quantizers.quality.result import QualityResult
from weightsmith.recipe.schema import Recipe
from weightsmith.serving.plan import ServingConfig
from weightsmith.steps.results import write_files
from weightsmith.validating.result import Validation


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
    quality: QualityResult | None
    config: ServingConfig | None
    published: Published | None
    forms: Mapping[str, Form]
    """What else was published, by kind."""
    results: tuple[Result, ...]
    checks: Sequence[Mapping[str, JsonValue]]
    """The checks of the started image, and their results."""
    started: str
    """The platform of that image; "" if none was started."""
    stages: Mapping[str, StageRecord]
    verdict: str
    """`passed`, `not proven` or `failed`."""
    unproven: tuple[str, ...]
    """Why passing shows nothing."""
    refused: str
    """Why the image was not published; "" if it was."""
    warnings: tuple[str, ...]
    inputs: Mapping[str, Writable]
    """Stage -> inputs of its result, so that the next plan can say what changed."""
    network_in_jobs: bool = False
    """Whether any job had network access, because the user allowed it."""
    memory_bytes: int = 0
    """Memory limit of every job."""
    takes_pictures: bool = False
    """Whether the server takes pictures."""


def write_record(facts: Facts, folder: Path) -> BuildRecord:
    """Write build.json and the rendered files into a folder; return what build.json says.

    A record of a build that ran nothing stays as it is. Each file is replaced atomically. Raises
    EnvironmentFailure if that fails.
    """
    record = build_record(facts)
    files = facts.config.files if facts.config else {}
    if earlier := recorded(folder, record):
        write_files(files, folder)
        return earlier
    write_files({**files, FILE: json.dumps(record.to_json(), indent=2) + "\n"}, folder)
    return record


def build_record(facts: Facts) -> BuildRecord:
    """Return the content of a target's build.json."""
    recipe, answered = facts.recipe, tuple(map(_answered, facts.results))
    first = answered[0] if answered else None
    return BuildRecord(
        name=recipe.name,
        version=recipe.version,
        target=facts.target,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        base=SourceRecord(
            **{**_source(facts.sources.base), **_given("license", recipe.base.license)}
        ),
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
        image=_served(facts, facts.published) if facts.published else None,
        forms={kind: _image(form) for kind, form in facts.forms.items()},
        task=first.task if first else NO_TASK,
        scores=first.scores if first else {},
        verdicts=first.verdicts if first else (),
        items=first.items if first else (),
        sameness=first.sameness if first else {},
        more_tasks=answered[1:],
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


def _given(key: str, value: str) -> dict[str, str]:
    return {key: value} if value else {}


def _source(snapshot: Snapshot) -> dict[str, Any]:
    return {
        "source": snapshot.source,
        "pin": snapshot.pin,
        "digest": snapshot.digest,
        "files": snapshot.tree.files,
        "license": license_of(snapshot.tree.texts),
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


def _served(facts: Facts, published: Published) -> ImageRecord:
    image = _image(published)
    return replace(image, started=facts.started, takes_pictures=facts.takes_pictures)


def _image(published: Form) -> ImageRecord:
    return ImageRecord(
        reference=published.reference,
        digest=published.digest,
        layers=tuple(LayerRecord(**asdict(layer)) for layer in published.layers),
        uploaded_bytes=published.uploaded_bytes,
        mounted=published.mounted,
        platforms=published.platforms if isinstance(published, Published) else {},
    )


def _answered(result: Result) -> AnsweredTask:
    task = result.task.task
    return AnsweredTask(
        name=task.name,
        task=TaskRecord(
            name=task.name,
            metric=task.metric,
            max_drop=result.task.settings.max_drop,
            sample_of=result.task.of,
        ),
        scores={
            name: ScoreRecord(score=s.score, n=s.n, metric=s.metric, interval=_interval(s))
            for name, s in result.scores.items()
        },
        verdicts=tuple(VerdictRecord.from_json(dict(one.facts)) for one in result.verdicts),
        items=tuple(side_by_side(result.scores)),
        sameness=result.sameness,
    )


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
    flags = facts.config.plan.docker_flags if facts.config else ()
    if not reference:
        return [
            "raise the quality (a larger format, a better adapter) or max_drop, and build again"
        ]
    if reference.startswith("oci:"):
        return [f"skopeo copy {quote(reference)} docker-daemon:{facts.recipe.name}:latest"]
    words = ("docker run --rm", f"-p 127.0.0.1:{port}:{port}", *flags, reference)
    return [
        " ".join(words),
        f"curl http://127.0.0.1:{port}/v1/models",
    ]
