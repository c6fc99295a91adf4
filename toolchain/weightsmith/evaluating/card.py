"""What a model's card on a hub says: from build.json, else from an image's labels.

https://huggingface.co/docs/hub/model-cards

It says what was measured, nothing else, and has no date, so that the same build gives the same
commit. No `model-index`: the hub shows it beside public benchmarks, and a task's questions are the
user's own. A suite that the recipe says is one has a file in `.eval_results/`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import yaml

from weightsmith.core.json_objects import OMITTED, JsonObject
from weightsmith.core.safe_parse import parse
from weightsmith.evaluating.build_record import (
    GRADED,
    LABELS,
    BuildRecord,
    ScoreRecord,
    SuiteRecord,
)
from weightsmith.evaluating.gate import wilson
from weightsmith.models.gguf_config import gguf_models, projector_of
from weightsmith.recipe.sources import is_remote

_HUB = re.compile(r"hf://(?P<name>[\w.-]+/[\w.-]+)@(?P<revision>[0-9a-f]{40})", re.ASCII)
_SCORE = re.compile(r"(?P<score>[01]\.\d+) (?P<metric>[\w-]+) n=(?P<n>\d+)")
RESULTS = ".eval_results/"
"""Folder of a hub's repository: https://huggingface.co/docs/hub/eval-results."""
_MOVED = "its engine was replaced after the test, and the new one was asked nothing"
_PLAIN = ("", "safetensors", "lora", "bf16", "f16", "f32")
"""Formats that lose nothing of the merged weights that a served answer shows."""
_PROCESSORS = frozenset({"preprocessor_config.json", "processor_config.json"})
"""Files of a checkpoint that also reads images. A GGUF file here holds the language part alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parent:
    """A model that this one was made from: its name, its pin, and what the user calls it."""

    name: str
    pin: str
    version: str = ""
    run_id: str = ""

    @property
    def hub(self) -> str:
        """Its `owner/name` on the hub; empty if it is not from there."""
        found = _HUB.fullmatch(self.pin)
        return found["name"] if found else ""

    @property
    def revision(self) -> str:
        """The commit on the hub, else the whole pin."""
        found = _HUB.fullmatch(self.pin)
        return found["revision"] if found else self.pin


@dataclass(frozen=True, slots=True, kw_only=True)
class CardSuite(JsonObject):
    """A suite's verdict, and the score of the last that was asked; as JSON in an image's label.

    A label has no score: of many questions, one near tie that another CPU decides otherwise would
    give another image.
    """

    name: str
    verdict: str
    n: int
    """Questions."""
    metric: str
    against: str = "adapter"
    score: float | None = field(default=None, metadata=OMITTED)
    who: str = field(default="", metadata=OMITTED)
    """Whose score it is."""
    interval: tuple[float, float] | None = field(default=None, metadata=OMITTED)
    graded: bool = field(default=False, metadata=OMITTED)

    @property
    def said(self) -> str:
        """What was asked, and the score with its 95 % interval if it is known, in words."""
        than = ", held against the base" if self.against == "base" else ""
        text = f"{self.n} questions, {self.metric}{than}"
        if self.score is None:
            return text
        right = round(self.score * self.n)
        low, high = self.interval or wilson(right, self.n)
        who, said = LABELS.get(self.who, self.who), f"{right} right"
        if self.graded:
            said = f"{self.score:.3f}"
        return f"{text}: {said} by {who} ({low:.2f} to {high:.2f})"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """Everything that a card says of a model; what is not known is empty."""

    name: str
    version: str = ""
    description: str = ""
    intended_use: str = ""
    limitations: str = ""
    license: str = ""
    base: Parent | None = None
    adapters: tuple[Parent, ...] = ()
    method: str = ""
    format: str = ""
    quantized: bool = False
    verdict: str = ""
    unproven: tuple[str, ...] = ()
    scores: Mapping[str, ScoreRecord] = field(default_factory=dict)
    """`base`, `adapter`, `merged` and `image`, of the first suite."""
    suites: tuple[CardSuite, ...] = ()
    """Every suite, if there are several."""
    checks: tuple[str, ...] = ()
    """How it was checked, one sentence each."""
    image: str = ""
    """The tested image's digest, if one was started. Its name may be of a private registry."""
    context: int = 0
    """Tokens of a prompt and its answer that it was planned for."""

    def view(self, repository: str, files: Sequence[str]) -> dict[str, object]:
        """Return what the card's template shows, for a repository `owner/name` with these files."""
        gguf = gguf_models(files)
        front: dict[str, object] = {}  # the card's metadata, by the hub's names
        if self.license.lower() in _licenses():
            front["license"] = self.license.lower()
        elif self.license:
            # As the hub allows it: lower case, letters, digits and dashes.
            slug = re.sub(r"[^a-z0-9.]+", "-", self.license.lower()).strip("-")[:60] or "unnamed"
            front |= {"license": "other", "license_name": slug}
        if self.base and self.base.hub:
            # https://huggingface.co/docs/hub/model-cards#specifying-a-base-model
            adapters = [one.hub for one in self.adapters if one.hub]
            one = "quantized" if self.quantized and not self.adapters else "finetune"
            front["base_model"] = [self.base.hub, *adapters]
            front["base_model_relation"] = "merge" if adapters else one
        front |= {} if gguf else {"library_name": "transformers"}
        sees = bool(projector_of(files)) if gguf else not _PROCESSORS.isdisjoint(files)
        front["pipeline_tag"] = "image-text-to-text" if sees else "text-generation"
        front["tags"] = ["weightsmith", *(["gguf"] if gguf else [])]
        rows = []
        for who, score in self.scores.items():
            low, high = score.interval or wilson(round(score.score * score.n), score.n)
            shown = {
                "right": score.right,
                "n": score.n,
                "score": score.score,
                "low": low,
                "high": high,
            }
            rows.append({"who": LABELS.get(who, who), "metric": score.metric, **shown})
        return {
            "card": self,
            "front": yaml.safe_dump(front, sort_keys=False, allow_unicode=True),
            "repository": repository,
            "gguf": gguf[0] if gguf else "",
            "rows": rows,
        }


def card_of_build(build: BuildRecord) -> ModelCard:
    """Return the card of a build's model."""
    said = build.recipe.get("card") or {}
    return ModelCard(
        name=build.name,
        version=build.version,
        description=str(said.get("description", "")),
        intended_use=str(said.get("intended_use", "")),
        limitations=str(said.get("limitations", "")),
        license=str(said.get("license", "")) or build.base.license,
        base=Parent(name=public_name(build.base.source), pin=build.base.pin),
        adapters=tuple(
            Parent(
                name=public_name(one.source), pin=one.pin, version=one.version, run_id=one.run_id
            )
            for one in build.adapters
        ),
        method=build.merge.method if build.merge and build.adapters else "",
        format=build.artifact.format if build.artifact else "",
        quantized=build.artifact is not None and build.artifact.bits_per_weight < 16,
        verdict=build.verdict,
        unproven=build.unproven,
        scores=build.scores,
        suites=tuple(map(_suite, build.tasks)) if len(build.tasks) > 1 else (),
        checks=tuple(_checks(build)),
        image=build.image.digest if build.image and build.image.started else "",
        context=int((build.plan or {}).get("max_model_len", 0)),
    )


def benchmark_files(build: BuildRecord) -> Mapping[str, bytes]:
    """Return the files of a hub's repository that say scores on its benchmarks, by path."""
    files = {}
    for suite in build.tasks:
        named, _, task = suite.task.benchmark.partition(":")
        dataset, _, commit = named.partition("@")
        scores = [suite.scores[who] for who in LABELS if who in suite.scores]
        if not (dataset and scores):
            continue
        asked = f"{scores[-1].n} questions, {scores[-1].metric}, asked by weightsmith"
        if suite.task.sample_of:
            asked += f"; a sample of {suite.task.sample_of}"
        row = {
            "dataset": {"id": dataset, "task_id": task} | ({"revision": commit} if commit else {}),
            "value": round(scores[-1].score, 6),
            "notes": asked,
        }
        name = f"{RESULTS}{dataset.partition('/')[2]}_{task}.yaml"
        files[name] = yaml.safe_dump([row], sort_keys=False).encode()
    return files


def card_of_labels(
    name: str, labels: Mapping[str, str], prefix: str, *, license_: str, context: int, image: str
) -> ModelCard:
    """Return the card of an image's model, from its labels, whose names begin with `prefix`.

    `image` is its digest, which the labels of what was not tested itself replace: of a form, or of
    an image on another base. It is not the tested image if it was not asked, or another platform's
    was in its place.
    """
    own = {key.removeprefix(prefix): text for key, text in labels.items() if key.startswith(prefix)}
    scores = {}
    for key, text in own.items():
        if key.startswith("score.") and (found := _SCORE.fullmatch(text)):
            metric = found["metric"]
            scores[key.removeprefix("score.")] = ScoreRecord(
                score=float(found["score"]),
                n=int(found["n"]),
                metric=metric,
                graded=metric in GRADED,
            )
    numbers = sorted({key.split(".")[1] for key in own if key.startswith("adapter.")})
    adapters = tuple(
        Parent(
            name=_named(own.get(f"adapter.{number}.pin", ""), f"adapter {number}"),
            pin=own.get(f"adapter.{number}.pin", ""),
            version=own.get(f"adapter.{number}.version", ""),
            run_id=own.get(f"adapter.{number}.run_id", ""),
        )
        for number in numbers
    )
    asked = "image" in scores and not own.keys() & {"tested.platform", "rebased.from"}
    moved = "rebased.from" in own and "tested.image" in own
    pin = own.get("base.pin", "")
    return ModelCard(
        name=labels.get("org.opencontainers.image.title") or name,
        version=labels.get("org.opencontainers.image.version", ""),
        license=license_,
        base=Parent(name=own.get("base.source") or _named(pin, "base"), pin=pin) if pin else None,
        adapters=adapters,
        method=own.get("merge.method", "") if adapters else "",
        format=own.get("format", ""),
        quantized=own.get("format", "") not in _PLAIN,
        verdict=own.get("verdict", ""),
        unproven=(_MOVED,) if moved else (),
        image=(own.get("tested.image", "") or image) if asked or moved else "",
        scores={who: scores[who] for who in LABELS if who in scores},
        suites=_labelled_suites(own.get("suites", "[]")),
        context=context,
    )


def _labelled_suites(text: str) -> tuple[CardSuite, ...]:
    """Return the suites of a label; () if it is not one that a build writes."""
    try:
        return tuple(map(CardSuite.from_json, parse(text)))
    except (ValueError, TypeError):
        return ()


def _suite(suite: SuiteRecord) -> CardSuite:
    who = [who for who in LABELS if who in suite.scores][-1]
    score, rule = suite.scores[who], suite.task
    return CardSuite(
        name=suite.name or "questions",
        verdict=suite.verdict,
        who=who,
        score=score.score,
        n=score.n,
        metric=score.metric,
        against=rule.against,
        interval=score.interval,
        graded=score.graded,
    )


def _checks(build: BuildRecord) -> Iterator[str]:
    """Yield how a build's model was checked."""
    if build.validation and build.adapters:
        found, agreed = build.validation, build.validation.top1_agreement
        logits = f", and {100 * agreed:.2f} % of next tokens agree" if agreed is not None else ""
        if found.passed:
            yield f"Every element of the merged weights was compared with base and adapters{logits}"
    for suite in build.tasks:
        if (merged := suite.scores.get("merged")) and merged.carried:
            yield f"The merged model's answers: {merged.asked}"
    if build.quality and build.quality.loss is not None:
        loss = build.quality.loss
        yield (
            f"Quantizing was measured against the merged checkpoint: KL divergence "
            f"{loss.kl_mean:.2g}, {100 * loss.top1:.0f} % the same next token, perplexity "
            f"{loss.perplexity_ratio:.2f} times the checkpoint's"
        )
    if build.checks:
        names = ", ".join(check.name for check in build.checks)
        yield f"The image with these weights was started and passed: {names}"
    for verdict in (verdict for suite in build.tasks for verdict in suite.verdicts):
        if verdict.binding and verdict.subject in {"dequantized", "image"}:
            yield verdict.reason[:1].upper() + verdict.reason[1:]


@cache
def _licenses() -> frozenset[str]:
    """Return the licences that the hub knows; any other is `other` with a name.

    https://huggingface.co/docs/hub/repositories-licenses
    """
    known = Path(__file__).with_name("hub_licenses.txt")
    return frozenset(known.read_text("utf-8").split())


def public_name(source: str) -> str:
    """Return a source's name; of a folder, only the last part."""
    return source if is_remote(source) else source.rstrip("/").rpartition("/")[2]


def _named(pin: str, otherwise: str) -> str:
    found = _HUB.fullmatch(pin)
    return f"hf://{found['name']}" if found else otherwise
