"""build.json -> report.html and report.md: what was built from what, and how good it is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NotRequired, TypedDict

from jinja2 import Environment, FileSystemLoader, StrictUndefined, UndefinedError, select_autoescape

from toolchain.errors import EnvironmentFailure, UsageError
from toolchain.evaluating.statistics import wilson
from toolchain.resources import templates
from toolchain.serving.memory import human
from toolchain.values import Json


class SourceFacts(TypedDict):
    """The base or an adapter: as the user wrote it, its pin, and the digest of its files."""

    source: str
    pin: str
    digest: str
    version: NotRequired[str]
    run_id: NotRequired[str]
    weight: NotRequired[float]


class MergeFacts(TypedDict):
    """How adapters were merged; `findings` are sentences of the validation."""

    method: str
    precision: str
    tensors: Mapping[str, int]
    findings: list[str]


class ArtifactFacts(TypedDict):
    """The served weights: size in bytes, and what the quantizer's check found."""

    format: str
    size: int
    bits_per_weight: float
    file: str
    digest: str
    details: Mapping[str, Json]


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


class LayerFacts(TypedDict):
    """One layer: size in bytes, and the file or purpose it holds."""

    digest: str
    size: int
    file: str


class ImageFacts(TypedDict):
    """The image by digest; `reference` is empty where it was not pushed or loaded."""

    reference: str
    digest: str
    layers: list[LayerFacts]


class ScoreFacts(TypedDict):
    """A score from 0 to 1 over n questions."""

    score: float
    n: int
    metric: str


class ItemFacts(TypedDict):
    """One question, its answers side by side, and which of them are right."""

    prompt: str
    expected: list[str]
    base: NotRequired[str]
    adapter: NotRequired[str]
    image: NotRequired[str]
    ok: Mapping[str, bool]


class StageFacts(TypedDict):
    """Whether a stage's result was there already, and the seconds it took."""

    cached: bool
    seconds: float


class BuildFacts(TypedDict):
    """What build.json holds of one target; all but the first five keys may be left out.

    `plan` is a ServingConfig's plan; `scores` has `base`, `adapter` and `image`; `created` is an
    ISO 8601 time; `next` are commands or sentences that say how to go on.
    """

    name: str
    version: str
    target: str
    created: str
    base: SourceFacts
    adapters: NotRequired[list[SourceFacts]]
    merge: NotRequired[MergeFacts]
    artifact: NotRequired[ArtifactFacts]
    quality: NotRequired[QualityFacts]
    plan: NotRequired[Mapping[str, Json]]
    image: NotRequired[ImageFacts]
    scores: NotRequired[Mapping[str, ScoreFacts]]
    items: NotRequired[list[ItemFacts]]
    stages: NotRequired[Mapping[str, StageFacts]]
    warnings: NotRequired[list[str]]
    next: NotRequired[list[str]]


_OPTIONAL: Mapping[str, Json] = {
    "adapters": [],
    "merge": None,
    "artifact": None,
    "quality": None,
    "plan": None,
    "image": None,
    "scores": {},
    "items": [],
    "stages": {},
    "warnings": [],
    "next": [],
}
_PATHS = ("base", "adapter", "image")


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """Where a report is."""

    html: Path
    markdown: Path


def write_report(build: Mapping[str, Json], folder: Path) -> Written:
    """Write report.html and report.md of a build (see BuildFacts) and return their paths.

    Both stand alone: no script, font or image comes from elsewhere. Raises UsageError for facts
    that are missing and EnvironmentFailure for a folder that cannot be written.
    """
    written = []
    for name in ("report.html", "report.md"):
        path = folder / name
        text = render_report(build, f"{name}.j2")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path.write_text(text, "utf-8")
        except OSError as error:
            raise EnvironmentFailure(
                f"cannot write {path}: {error.strerror}", hint="choose another output folder"
            ) from None
        written.append(path)
    return Written(html=written[0], markdown=written[1])


def render_report(build: Mapping[str, Json], template: str) -> str:
    """Return the report's text; `template` is `report.html.j2` or `report.md.j2`."""
    environment = Environment(
        loader=FileSystemLoader(templates() / "report"),
        undefined=StrictUndefined,
        autoescape=select_autoescape(("html.j2",)),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(size=human, cell=_cell, pretty=_pretty, seconds=_seconds)
    facts = {**_OPTIONAL, **{k: v for k, v in build.items() if v is not None}}
    facts["paths"] = [path for path in _PATHS if path in facts["scores"]]
    facts["intervals"] = {
        path: wilson(round(score["score"] * score["n"]), score["n"])
        for path, score in facts["scores"].items()
    }
    facts["memory"] = _memory(facts["plan"])
    try:
        return environment.get_template(template).render(facts)
    except UndefinedError as error:
        raise UsageError(
            f"{template}: {error.message}", hint="build.json lacks what the report shows"
        ) from None


def _memory(plan: Mapping[str, Json] | None) -> list[Mapping[str, Json]]:
    """Return the parts of the memory bar, in bytes and in percent of what is usable."""
    if not plan:
        return []
    parts = {
        "weights": int(plan["weight_bytes"]),
        "cache": int(plan["kv_bytes_total"]),
        "overhead": int(plan["overhead_bytes"]),
    }
    # A plan that leaves layers on the host needs more than the GPU has: the bar shows all of it.
    whole = max(int(plan["usable_bytes"]), sum(parts.values())) or 1
    parts["free"] = whole - sum(parts.values())
    return [
        {"name": name, "bytes": size, "percent": round(100 * size / whole, 2)}
        for name, size in parts.items()
    ]


def _cell(value: Json) -> str:
    """Return text for a cell of a Markdown table: one line, nothing of it markup."""
    flat = " ".join(str(value).split())
    for character in "\\`*_[]<>|":
        flat = flat.replace(character, f"\\{character}")
    return flat


def _pretty(value: Json) -> str:
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False)


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value < 120 else f"{value / 60:.1f} min"
