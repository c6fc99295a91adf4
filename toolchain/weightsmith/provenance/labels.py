"""An image's name and labels: what it was made from, and which layers are for what."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from weightsmith.core.errors import InputRefused
from weightsmith.core.safe_parse import parse
from weightsmith.core.values import (
    Artifact,
    Digest,
    Json,
    JsonValue,
    Sources,
    canonical,
    plain,
    without_passwords,
)
from weightsmith.evaluating.card import CardSuite
from weightsmith.evaluating.replay import ReplaySet
from weightsmith.evaluating.results import NOT_PROVEN, Result, verdict_of, verdicts_of
from weightsmith.oci.image import (
    DEFAULT_PLATFORM,
    OWN_LABELS,
    ROLES,
    STANDARD,
    Healthcheck,
    Image,
    ImageConfig,
    Order,
    assemble,
    layers_by_role,
)
from weightsmith.oci.layers import Layer
from weightsmith.oci.manifests import OLLAMA_MODEL
from weightsmith.provenance.bills import OWN_ENGINE
from weightsmith.quantizers.quality.result import QualityResult
from weightsmith.recipe.schema import Recipe
from weightsmith.recipe.sources import is_remote
from weightsmith.serving.plan import ServingConfig, ServingPlan

PREFIX = OWN_LABELS
"""Prefix of our labels; the others are those of image-spec annotations.md."""
_SCORE = PREFIX + "score."
_SAMENESS = PREFIX + "sameness."
PLAN = PREFIX + "plan"
VERDICT = PREFIX + "verdict"
"""Label: `passed`, or `not proven` if the gate could not have failed, or had no say."""
REBASED = PREFIX + "rebased.from"
"""Label: the digest of the image whose base was replaced."""
ENGINE_LABEL = PREFIX + "engine"
"""Label: the engine in the image."""
ENGINE_VERSION = PREFIX + "engine.version"
"""The version of the engine in the image, which the plan was made for."""
_RELEASE = re.compile(r"\d\d\.(04|10)\b")
"""Of Ubuntu: year and month."""
ARTIFACT = PREFIX + "artifact.digest"
TESTED_PLATFORM = PREFIX + "tested.platform"
"""Label: the platform whose image was started and questioned in place of this one."""
TESTED = PREFIX + "tested.image"
"""Label: the digest of the image that was started and questioned with the same weights."""
ADDED = PREFIX + "config"
"""Label: what was added to the base's configuration, so that the base can be replaced."""
REPLAY_DIGEST = PREFIX + "replay.digest"
"""Label: the digest of the image's replay set, with its questions."""
REPLAY_COUNT = PREFIX + "replay.questions"
"""Label: how many questions it has."""
BASE_NAME = STANDARD + "base.name"
BASE_DIGEST = STANDARD + "base.digest"
LICENSES = STANDARD + "licenses"
"""Label: the model's licence."""


def tag(recipe: Recipe, target: str) -> str:
    """Return the image's tag, `VERSION-TARGET`."""
    return f"{recipe.version}-{target}"


def reference(recipe: Recipe, target: str) -> str:
    """Return `REPOSITORY:VERSION-TARGET`."""
    return f"{repository(recipe)}:{tag(recipe, target)}"


def repository(recipe: Recipe) -> str:
    """Return the repository of the recipe's images; the default is the recipe's name."""
    return recipe.image.repository or recipe.name


def labels(
    recipe: Recipe,
    sources: Sources,
    artifact: Artifact,
    quality: QualityResult | None,
    config: ServingConfig,
) -> dict[str, str]:
    """Return the labels: every source by digest, and the serving plan.

    The plan has nothing of the planning machine: labels depend only on the inputs, so that the
    same inputs give the same digest.
    """
    found: dict[str, str] = {
        STANDARD + "title": recipe.name,
        STANDARD + "version": recipe.version,
        STANDARD + "description": recipe.card.description,
        PREFIX + "target": config.target,
        PREFIX + "format": artifact.format.name,
        PREFIX + "base.source": public_name(sources.base.source),
        PREFIX + "base.pin": sources.base.pin,
        PREFIX + "base.digest": sources.base.digest,
        PREFIX + "merge.method": recipe.merge.method,
        PREFIX + "merge.precision": recipe.merge.precision,
        PLAN: plan_label(config.plan),
    }
    if draft := sources.draft:
        stem = PREFIX + "draft."
        found |= {stem + "source": public_name(draft.source), stem + "pin": draft.pin}
        found |= {stem + "digest": draft.digest}
    found |= _quality(quality)
    for number, adapter in enumerate(sources.adapters):
        stem = f"{PREFIX}adapter.{number}."
        found |= {
            stem + "pin": adapter.snapshot.pin,
            stem + "digest": adapter.snapshot.digest,
            stem + "weight": repr(adapter.weight),
            stem + "version": adapter.version,
            stem + "run_id": adapter.run_id,
        }
    every = {**found, **recipe.image.labels}
    return {key: without_passwords(value) for key, value in every.items() if value}


def plan_label(plan: ServingPlan) -> str:
    """Return a plan as its label has it; JSON, so a number that is not finite is a bug here."""
    return json.dumps(plan.portable(), sort_keys=True, separators=(",", ":"), allow_nan=False)


def without_secrets(recipe: Mapping[str, Json]) -> dict[str, Json]:
    """Return a recipe, or a section of it, without secrets.

    People put keys into a program's arguments, so only its name stays, and that it has arguments.
    Their digest would reveal short ones, and nobody needs to compare them.
    """
    return {
        key: _program(inner) if key == "command" else _without_secrets(inner)
        for key, inner in recipe.items()
    }


def _without_secrets(value: JsonValue) -> JsonValue:
    if isinstance(value, dict):
        return without_secrets(value)
    if isinstance(value, list):
        return [_without_secrets(inner) for inner in value]
    return without_passwords(value)


def _program(words: Sequence[str]) -> list[str]:
    return [Path(words[0]).name, *(["…"] if words[1:] else [])] if words else []


def _quality(quality: QualityResult | None) -> dict[str, str]:
    """Return the quantization loss, rounded: the last digits differ between machines."""
    if quality is None or quality.loss is None:
        return {}
    keys = ("kl_mean", "kl_p99", "top1", "perplexity_ratio")
    measured = (f"{key}={getattr(quality.loss, key):.2g}" for key in keys)
    return {PREFIX + "quality": " ".join(measured)}


def public_name(source: str) -> str:
    """Return the name of a source for an image: of a folder, only its name.

    With its path, the same inputs would give another digest on another machine.
    """
    return source if is_remote(source) else Path(source).absolute().name


def result_labels(results: Sequence[Result], stand_in: str = "") -> dict[str, str]:
    """Return what the test of an image showed: the verdict, and the first task's scores.

    One label per score (`base`, `adapter`, `image`, each from 0 to 1 over n items) and per share
    of answers that are the reference's to the letter (`merged`, `image`); {} without a task.
    `stand_in` is the platform of the image that was started in place of this one, which is then
    not proven.
    """
    untested = {TESTED_PLATFORM: stand_in} if stand_in else {}
    if not results:
        return untested
    scores = results[0].scores
    found = {
        f"{_SCORE}{name}": f"{scores[name].score:.4f} {scores[name].metric} n={scores[name].n}"
        for name in ("base", "adapter", "image")
        if name in scores
    }
    same = {
        f"{_SAMENESS}{name}": f"{1 - len(same.differences) / same.n:.4f} n={same.n}"
        for name, same in results[0].sameness.items()
    }
    suites = {PREFIX + "suites": json.dumps(_suites(results))} if len(results) > 1 else {}
    return {
        **found,
        **same,
        **suites,
        **untested,
        VERDICT: NOT_PROVEN if stand_in else verdict_of(results),
    }


def _suites(results: Sequence[Result]) -> list[JsonValue]:
    """Return each suite's verdict."""
    return [
        CardSuite(
            name=one.task.task.name,
            verdict=verdict,
            n=len(one.task.task.items),
            metric=one.task.task.metric,
            against=one.task.rule.against,
        ).to_json()
        for one, verdict in zip(results, verdicts_of(results), strict=True)
    ]


def replay_labels(made: ReplaySet) -> dict[str, str]:
    """Return what an image says of its replay set: the whole set's digest, and how many ask."""
    return {REPLAY_DIGEST: made.digest, REPLAY_COUNT: str(len(made.questions))}


def moved_labels(old: Mapping[str, str], digest: Digest) -> dict[str, str]:
    """Return what an image's labels say of its test once its base is replaced; {} without a test.

    The scores stay, with the digest of the image that has them: nobody asked the new engine.
    """
    if VERDICT not in old:
        return {}
    known = TESTED in old or TESTED_PLATFORM in old
    return {**({} if known else {TESTED: digest}), VERDICT: NOT_PROVEN}


def plan_of(labels: Mapping[str, str]) -> ServingPlan:
    """Return the plan in an image's labels; a CPU plan of zeros if there is no valid one.

    A CPU plan in an image has nothing of the planning machine.
    """
    with suppress(ValueError):
        return ServingPlan.from_json(plan_in(labels))
    return ServingPlan()


def engine_version(labels: Mapping[str, str]) -> str:
    """Return the engine version in a base's labels, or empty.

    What is made from Ubuntu's image, such as NVIDIA's and so the engines' own, inherits its labels
    `ref.name` and `version`, unless it sets others. Ubuntu's release is no engine's version.
    """
    said = labels.get(STANDARD + "version", "")
    release = labels.get(STANDARD + "ref.name") == "ubuntu" and _RELEASE.match(said)
    return labels.get(ENGINE_VERSION) or ("" if release else said)


def plan_in(labels: Mapping[str, str]) -> Mapping[str, JsonValue]:
    """Return the plan in an image's labels, for display; {} if there is no valid one."""
    try:
        plan = parse(labels.get(PLAN, "{}"))
    except ValueError:
        return {}
    return plan if isinstance(plan, dict) else {}


def scores_in(labels: Mapping[str, str]) -> dict[str, float]:
    """Return the scores in an image's labels; invalid ones are left out."""
    found = {}
    for name in sorted(labels):
        if name.startswith(_SCORE):
            with suppress(ValueError):
                found[name.removeprefix(_SCORE)] = float(labels[name].partition(" ")[0])
    return {name: score for name, score in found.items() if math.isfinite(score)}


def has_own_engine(labels: Mapping[str, str]) -> bool:
    """Return whether an image's labels say that its engine was made here."""
    return labels.get(BASE_NAME, "").startswith(OWN_ENGINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Roles:
    """An image's layers by role."""

    base: tuple[Layer, ...]
    weights: tuple[Layer, ...]
    settings: tuple[Layer, ...]
    weights_first: bool
    config: ImageConfig
    """What was added to the base, including the base's own labels."""


def assemble_in_roles(
    weights: Sequence[Layer],
    settings: Sequence[Layer],
    config: ImageConfig,
    base: Image | None,
    base_name: str,
    *,
    order: Order,
    version: str,
    platform: str = DEFAULT_PLATFORM,
) -> Image:
    """Return an image whose labels say what its layers are for and what was added to its base.

    So `rebase` can replace the base. `version` is the engine's; "" if unknown. `platform` is used
    only without a base.
    """
    counts = [("base", len(base.layers) if base else 0), ("weights", len(weights))]
    if order == "weights-first":
        counts.reverse()
    labels = {
        **config.labels,
        **({BASE_NAME: base_name} if base_name else {}),
        **({BASE_DIGEST: base.digest} if base else {}),
        **({ENGINE_VERSION: version} if version else {}),
        ROLES: " ".join(f"{role}:{n}" for role, n in (*counts, ("settings", len(settings)))),
    }
    # What is added to a base, without the labels' own values.
    stated = {**plain(config), "labels": sorted(labels)}
    added = canonical({key: value for key, value in stated.items() if value}).decode()
    return assemble(
        weights,
        settings,
        config=replace(config, labels={**labels, ADDED: added}),
        base=base,
        annotations={k: v for k, v in labels.items() if k.startswith(STANDARD)},
        order=order,
        platform=platform,
    )


def weights_of(image: Image, where: str) -> tuple[Layer, ...]:
    """Return the layers with the model's files; raises InputRefused as `roles_of` does."""
    if models := tuple(layer for layer in image.layers if layer.media_type == OLLAMA_MODEL):
        return models
    return image.layers if image.artifact_type else roles_of(image, where).weights


def roles_of(image: Image, where: str) -> Roles:
    """Return an image's roles; raises InputRefused if its labels are missing or wrong.

    Also for a form that has no engine, since it has only files.
    """
    if image.has_files:
        raise InputRefused(
            f"{where} holds a model's files and no engine", hint="give the image of the same build"
        )
    found = layers_by_role(image)
    if not found:
        raise InputRefused(
            f"{where} has no label that says which layers are weights",
            hint="only images made by `build` or `bake` have it",
        )
    return Roles(
        base=found.get("base", ()),
        weights=found.get("weights", ()),
        settings=found.get("settings", ()),
        weights_first=next(iter(found)) == "weights",
        config=_config(image, where),
    )


def _config(image: Image, where: str) -> ImageConfig:
    try:
        stated: Mapping[str, Json] = parse(image.labels.get(ADDED, ""))
        check = stated.get("healthcheck")
        return ImageConfig(
            user=stated.get("user"),
            env={str(key): str(value) for key, value in (stated.get("env") or {}).items()},
            entrypoint=tuple(map(str, stated.get("entrypoint") or ())) or None,
            cmd=tuple(map(str, stated.get("cmd") or ())) or None,
            ports=tuple(int(port) for port in stated.get("ports") or ()),
            healthcheck=Healthcheck(**{**check, "command": tuple(check["command"])})
            if check
            else None,
            labels={key: image.labels[key] for key in stated.get("labels") or ()},
            working_dir=stated.get("working_dir"),
        )
    except (ValueError, TypeError, KeyError, AttributeError):
        raise InputRefused(
            f"{where}: its label {ADDED} is damaged",
            hint="the image is damaged; push or write it again",
        ) from None
