"""build.json for everybody: what a model was made from, and how it was judged.

A build's own has questions, answers, paths of the machine and names of private registries, and
times, by which the same build would give another commit. So this has only what is named here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace

from weightsmith import __version__
from weightsmith.core.values import Digest, JsonValue
from weightsmith.evaluating.build_record import (
    AdapterRecord,
    ArtifactRecord,
    BuildRecord,
    ImageRecord,
    SourceRecord,
    SuiteRecord,
    VerdictRecord,
)
from weightsmith.evaluating.card import ModelCard, public_name


def public_record(build: BuildRecord) -> BuildRecord:
    """Return what everybody may know of a build that published."""
    return BuildRecord(
        name=build.name,
        version=build.version,
        target=build.target,
        created="",
        made_by=__version__,
        base=replace(build.base, source=public_name(build.base.source), files=()),
        adapters=tuple(
            replace(one, source=public_name(one.source), files=()) for one in build.adapters
        ),
        merge=replace(build.merge, findings=()) if build.merge else None,
        artifact=_weights(build.artifact),
        quality=build.quality,
        image=_image(build.image),
        replay=build.replay,
        task=build.task,
        scores=build.scores,
        verdicts=_verdicts(build.verdicts),
        suites=tuple(map(_suite, build.suites)),
        inputs={stage: dict(_digests(given)) for stage, given in build.inputs.items()},
        verdict=build.verdict,
        unproven=build.unproven,
        network_in_jobs=build.network_in_jobs,
    )


def record_of_card(card: ModelCard) -> BuildRecord | None:
    """Return what a card says, for a model whose own record is not at hand; None of no base."""
    if card.base is None:
        return None
    image = ImageRecord(reference="", digest=card.image, layers=()) if card.image else None
    return BuildRecord(
        name=card.name,
        version=card.version,
        target="",
        created="",
        base=SourceRecord(
            source=card.base.name, pin=card.base.pin, digest="", license=card.license
        ),
        adapters=tuple(
            AdapterRecord(
                source=one.name, pin=one.pin, digest="", version=one.version, run_id=one.run_id
            )
            for one in card.adapters
        ),
        image=image,
        scores=card.scores,
        verdict=card.verdict,
        unproven=card.unproven,
    )


def file_of(record: BuildRecord) -> bytes:
    """Return build.json."""
    return (json.dumps(record.to_json(), indent=2) + "\n").encode()


def _weights(artifact: ArtifactRecord | None) -> ArtifactRecord | None:
    return replace(artifact, details={}) if artifact else None


def _image(image: ImageRecord | None) -> ImageRecord | None:
    """Return an image by its digests: its name may be of a private registry."""
    if image is None:
        return None
    return replace(image, reference="", layers=(), uploaded_bytes=0, mounted=0)


def _suite(suite: SuiteRecord) -> SuiteRecord:
    # What is the same has texts of answers.
    return replace(suite, sameness={}, verdicts=_verdicts(suite.verdicts))


def _verdicts(given: tuple[VerdictRecord, ...]) -> tuple[VerdictRecord, ...]:
    """Return verdicts by their figures: a reason may quote what a server or a program printed."""
    return tuple(replace(one, reason="") for one in given)


def _digests(given: JsonValue) -> Iterator[tuple[str, JsonValue]]:
    """Yield which contents a stage depended on, and what made it; its options may be anything."""
    for key, value in given.items() if isinstance(given, dict) else ():
        listed = value if isinstance(value, list) else [value]
        if key == "quantizer" or (listed and all(map(_is_digest, listed))):
            yield key, value


def _is_digest(value: JsonValue) -> bool:
    try:
        return isinstance(value, str) and bool(Digest(value))
    except ValueError:
        return False
