"""The keys of build.json that a report shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NotRequired, TypedDict

from weightsmith.values import Json


class SourceFacts(TypedDict):
    """The base or an adapter: as the user wrote it, its pin, and the digest of its files."""

    source: str
    pin: str
    digest: str
    version: NotRequired[str]
    run_id: NotRequired[str]
    weight: NotRequired[float]


class MergeFacts(TypedDict):
    """How adapters were merged; `findings` are sentences."""

    method: str
    precision: str
    tensors: Mapping[str, int]
    findings: list[str]
    digest: NotRequired[str]


class LayerDifference(TypedDict):
    """How far the hidden states after a layer are from base+adapter's, as part of their size.

    `difference` of the merged model, `rounding` of an exact merge in the same type; `parted` where
    rounding does not explain it.
    """

    layer: int
    difference: float
    rounding: float
    parted: bool


class GreedyFacts(TypedDict):
    """How both sides go on after a probe; `same` of the `tokens` come first in both."""

    after: str
    reference: str
    merged: str
    tokens: int
    same: int


class ValidationFacts(TypedDict):
    """Merged checkpoint against base+adapter on probes: what `validate` found.

    Numbers are None where the two were not run; `layers` are in the model's order.
    """

    passed: bool
    max_abs_logit_diff: float | None
    kl_mean: float | None
    kl_max: float | None
    top1_agreement: float | None
    findings: list[Json]
    layers: NotRequired[list[LayerDifference]]
    first_difference: NotRequired[int | None]
    greedy: NotRequired[list[GreedyFacts]]


class QualityFacts(TypedDict):
    """What quantizing lost on held-out text; `skipped` says why it was not measured."""

    kl_mean: NotRequired[float]
    kl_p99: NotRequired[float]
    top1: NotRequired[float]
    perplexity_ratio: NotRequired[float]
    limits: NotRequired[Mapping[str, float]]
    exceeded: NotRequired[list[str]]
    worst_layers: NotRequired[list[Mapping[str, Json]]]
    skipped: NotRequired[str]


class ArtifactFacts(TypedDict):
    """The served weights: size in bytes, and what the quantizer's check found."""

    format: str
    size: int
    bits_per_weight: float
    file: str
    digest: str
    details: Mapping[str, Json]


class LayerFacts(TypedDict):
    """One layer of the image: size in bytes, and the file or purpose it holds."""

    digest: str
    size: int
    file: str


class ImageFacts(TypedDict):
    """The image by digest; `reference` is empty where it was not published."""

    reference: str
    digest: str
    layers: list[LayerFacts]


class TaskFacts(TypedDict):
    """What was asked, and what may be lost."""

    name: str
    metric: str
    max_drop: float


class ScoreFacts(TypedDict):
    """A score from 0 to 1 over n questions, with its 95 % interval."""

    score: float
    n: int
    metric: str
    interval: NotRequired[list[float]]


class VerdictFacts(TypedDict):
    """One comparison, judged; `binding` ones decide."""

    subject: str
    against: str
    passed: bool
    binding: bool
    reason: str
    drop: NotRequired[float]
    interval: NotRequired[list[float]]
    lost: NotRequired[int]
    won: NotRequired[int]
    n: NotRequired[int]
    p: NotRequired[float]
    items_needed: NotRequired[int]


class ItemFacts(TypedDict):
    """One question, its answers side by side, and which of them are right."""

    prompt: str
    expected: list[str]
    base: NotRequired[str]
    adapter: NotRequired[str]
    merged: NotRequired[str]
    image: NotRequired[str]
    ok: Mapping[str, bool]


class CheckFacts(TypedDict):
    """One check of the started image, that it passed."""

    name: str
    seen: str
    seconds: float


class StageFacts(TypedDict):
    """Whether a stage's result was there already, and the seconds it took."""

    cached: bool
    seconds: float


class MoreTask(TypedDict):
    """A further task, an adapter's own: the same keys as the first has at the top."""

    name: str
    task: TaskFacts
    scores: Mapping[str, ScoreFacts]
    verdicts: list[VerdictFacts]
    items: list[ItemFacts]


class BuildFacts(TypedDict):
    """What build.json holds of one target; all but the first five keys may be left out.

    `plan` is a ServingConfig's plan; `scores` has `base`, `adapter`, `merged` and `image`;
    `created` is an ISO 8601 time; `next` are commands or sentences that say how to go on.
    """

    name: str
    version: str
    target: str
    created: str
    base: SourceFacts
    adapters: NotRequired[list[SourceFacts]]
    merge: NotRequired[MergeFacts]
    validation: NotRequired[ValidationFacts]
    artifact: NotRequired[ArtifactFacts]
    quality: NotRequired[QualityFacts]
    plan: NotRequired[Mapping[str, Json]]
    image: NotRequired[ImageFacts]
    task: NotRequired[TaskFacts]
    scores: NotRequired[Mapping[str, ScoreFacts]]
    verdicts: NotRequired[list[VerdictFacts]]
    items: NotRequired[list[ItemFacts]]
    more_tasks: NotRequired[list[MoreTask]]
    checks: NotRequired[list[CheckFacts]]
    stages: NotRequired[Mapping[str, StageFacts]]
    refused: NotRequired[str]
    warnings: NotRequired[list[str]]
    reproduce: NotRequired[list[str]]
    next: NotRequired[list[str]]


OPTIONAL: Mapping[str, Json] = {
    "adapters": [],
    "merge": None,
    "validation": None,
    "artifact": None,
    "quality": None,
    "plan": None,
    "image": None,
    "task": {"name": "", "metric": "", "max_drop": 0.0},
    "scores": {},
    "verdicts": [],
    "items": [],
    "more_tasks": [],
    "checks": [],
    "stages": {},
    "refused": "",
    "warnings": [],
    "reproduce": [],
    "next": [],
}


def whole(build: Mapping[str, Json]) -> dict[str, Json]:
    """Return the facts with every optional key there."""
    return {**OPTIONAL, **{key: value for key, value in build.items() if value is not None}}
