"""Artifact + ServingConfig + base -> Image: layers in memory, nothing written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from weightsmith.errors import InputRefused
from weightsmith.oci.collisions import first_collision
from weightsmith.oci.image import Healthcheck, Image, ImageConfig, Order, assemble
from weightsmith.oci.layers import Member, TarLayer
from weightsmith.oci.weights import most_beside, weight_layers
from weightsmith.ports import Store
from weightsmith.provenance.labels import ENGINE_VERSION
from weightsmith.provenance.roles import ADDED, LAYERS, config_label, roles_label
from weightsmith.serving.plan import ServingConfig
from weightsmith.values import Artifact, Pieces

USER = "65532:65532"
"""The unprivileged user that images run as, by number: the image may have no user database."""

_BASE = "org.opencontainers.image.base."


def bake(
    artifact: Artifact,
    config: ServingConfig | None,
    *,
    base: Image | None,
    labels: Mapping[str, str],
    store: Store,
    base_name: str = "",
    engine_version: str = "",
    model_dir: str = "/models",
    order: Order = "engine-first",
    largest: int = 0,
    contents: Mapping[str, Pieces] | None = None,
) -> Image:
    """Return an image of an artifact: the base, a layer per weight file, a small one on top.

    Without `config` the image serves nothing: it holds the weights for others to mount. The
    weight layers are the same for every kind of image. Layer digests are remembered in the
    store, so an unchanged file is not hashed again. Raises UsageError above 125 layers,
    InputRefused for a base that would hide weights below it.
    """
    if order == "weights-first" and base:
        _require_clear(base, base_name, model_dir, store)
    weights = weight_layers(
        artifact.tree,
        model_dir,
        memo=store.memo,
        most=most_beside(len(base.layers) if base else 0),
        largest=largest,
        contents=contents,
    )
    inside = config.image_files if config else {}
    files = tuple(
        Member.of_bytes(path.lstrip("/"), text.encode()) for path, text in sorted(inside.items())
    )
    settings = (TarLayer(members=files),) if files else ()
    below, middle = ("base", len(base.layers) if base else 0), ("weights", len(weights))
    if order == "weights-first":
        below, middle = middle, below
    said = {
        **labels,
        **({_BASE + "name": base_name} if base_name else {}),
        **({_BASE + "digest": base.digest} if base else {}),
        **({ENGINE_VERSION: engine_version} if engine_version else {}),
        LAYERS: roles_label(below, middle, ("settings", len(settings))),
    }
    added = _added(config, said)
    added = replace(added, labels={**said, ADDED: config_label(added)})
    return assemble(
        weights,
        settings,
        config=added,
        base=base,
        annotations={k: v for k, v in said.items() if k.startswith("org.opencontainers.")},
        order=order,
    )


def _require_clear(base: Image, name: str, model_dir: str, store: Store) -> None:
    """Refuse weights below a base that has files of its own in their folder."""
    if found := first_collision(base, [model_dir.strip("/")], store.memo):
        raise InputRefused(
            f"the base {name} has /{found}, which would hide weights below it",
            hint="take the order engine-first, or another base",
        )


def _added(config: ServingConfig | None, labels: Mapping[str, str]) -> ImageConfig:
    if config is None:
        return ImageConfig(user=USER, labels=labels)
    return ImageConfig(
        user=USER,
        env=dict(sorted(config.env.items())),  # an order that survives the label
        entrypoint=config.entrypoint or None,
        cmd=config.command,
        ports=(config.port,),
        healthcheck=Healthcheck(command=config.healthcheck) if config.healthcheck else None,
        labels=labels,
    )
