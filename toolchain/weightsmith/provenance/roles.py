"""Tells from an image's labels which layers are the engine, the weights and the settings."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from weightsmith.core.errors import InputRefused
from weightsmith.core.safe_parse import parse
from weightsmith.core.values import Json, canonical, plain
from weightsmith.oci.configuration import Healthcheck, ImageConfig
from weightsmith.oci.image import DEFAULT_PLATFORM, Image, Order, assemble
from weightsmith.oci.layers import Layer
from weightsmith.oci.manifests import OLLAMA_MODEL
from weightsmith.provenance.bills import OWN_ENGINE
from weightsmith.provenance.labels import ENGINE_VERSION, PREFIX

LAYERS = PREFIX + "layers"
"""Label: roles of the layers, bottom first, such as `base:1 weights:2 settings:1`."""
ADDED = PREFIX + "config"
"""Label: what was added to the base's configuration, so that the base can be replaced."""
BASE_NAME = "org.opencontainers.image.base.name"
BASE_DIGEST = "org.opencontainers.image.base.digest"
_ROLE = re.compile(r"(base|weights|settings):([0-9]{1,3})")


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
        LAYERS: " ".join(f"{role}:{n}" for role, n in (*counts, ("settings", len(settings)))),
    }
    # What is added to a base, without the labels' own values.
    stated = {**plain(config), "labels": sorted(labels)}
    added = canonical({key: value for key, value in stated.items() if value}).decode()
    return assemble(
        weights,
        settings,
        config=replace(config, labels={**labels, ADDED: added}),
        base=base,
        annotations={k: v for k, v in labels.items() if k.startswith("org.opencontainers.")},
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
    parts = [_ROLE.fullmatch(part) for part in image.labels.get(LAYERS, "").split()]
    counts = {part[1]: int(part[2]) for part in parts if part}
    if not all(parts) or not counts or sum(counts.values()) != len(image.layers):
        raise InputRefused(
            f"{where} has no label that says which layers are weights",
            hint="only images made by `build` or `bake` have it",
        )
    at, found = 0, {}
    for role, count in counts.items():
        found[role] = image.layers[at : at + count]
        at += count
    return Roles(
        base=found.get("base", ()),
        weights=found.get("weights", ()),
        settings=found.get("settings", ()),
        weights_first=next(iter(counts)) == "weights",
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
