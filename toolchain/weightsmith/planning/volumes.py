"""Manifests for an image of weights beside the engine's own image."""

from __future__ import annotations

from collections.abc import Mapping

from weightsmith.oci.layout import is_layout
from weightsmith.planning.request import BuildRequest
from weightsmith.provenance.materials import ImageInputs
from weightsmith.serving.plan import ServingConfig
from weightsmith.serving.targets import Target
from weightsmith.stages.base import OWN, base_reference
from weightsmith.stages.render import render_volume
from weightsmith.values import LORA

FOLDER = "volume"
"""Where they are in a target's results."""


def volume_files(
    request: BuildRequest, target: Target, config: ServingConfig, image: ImageInputs, volume: str
) -> Mapping[str, str]:
    """Return the manifests by file name; {} if the engine has no image of its own for the device.

    `image` is what the tested image was made of, `volume` the image of weights by digest.
    """
    recipe = request.file.recipe
    engine = stock_image(target, config.plan.device, recipe.image.base)
    if not engine:
        return {}
    if "@" not in engine and engine == image.base_name and len(image.bases) == 1:
        engine = f"{engine}@{image.bases[0].digest}"
    return render_volume(
        config,
        target.engine,
        recipe.name,
        recipe.version,
        volume=volume,
        engine_image=engine,
        merged=target.format != LORA,
    )


def stock_image(target: Target, device: str, override: str) -> str:
    """Return a reference of the engine without weights; empty if there is none in a registry."""
    chosen = base_reference(target.engine, device, override)
    if chosen.startswith(OWN):
        return target.engine.base.stock_cpu
    return "" if is_layout(chosen) else chosen
