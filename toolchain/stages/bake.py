"""Artifact + ServingConfig + base -> Image: layers in memory, nothing written."""

from __future__ import annotations

from collections.abc import Mapping

from toolchain.oci.image import Healthcheck, Image, ImageConfig, Order, assemble
from toolchain.oci.layers import Member, TarLayer, weight_layers
from toolchain.ports import Store
from toolchain.values import Artifact, ServingConfig

USER = "65532:65532"
"""The unprivileged user that images run as, by number: the image may have no user database."""


def bake(
    artifact: Artifact,
    config: ServingConfig,
    *,
    base: Image,
    labels: Mapping[str, str],
    store: Store,
    model_dir: str = "/models",
    order: Order = "engine-first",
) -> Image:
    """Return the image that serves an artifact: the base, a layer per weight file, a small one.

    Layer digests are remembered in the store, so an unchanged file is not hashed again.
    Raises UsageError above 125 layers.
    """
    files = tuple(
        Member.of_bytes(path.lstrip("/"), text.encode())
        for path, text in sorted(config.image_files.items())
    )
    check = Healthcheck(command=config.healthcheck) if config.healthcheck else None
    return assemble(
        weight_layers(artifact.tree, model_dir, memo=store.memo),
        (TarLayer(members=files),) if files else (),
        config=ImageConfig(
            user=USER,
            env=config.env,
            entrypoint=config.entrypoint or None,
            cmd=config.command,
            ports=(config.port,),
            healthcheck=check,
            labels=labels,
        ),
        base=base,
        annotations={
            key: value for key, value in labels.items() if key.startswith("org.opencontainers.")
        },
        order=order,
    )
