"""The layer with the program by which an image's health is checked, and its replay set asked.

It is the same in all images of a platform, and works without Python, shell and curl.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from weightsmith.core.errors import EnvironmentFailure
from weightsmith.core.values import JsonValue
from weightsmith.models.facts import ModelFacts
from weightsmith.oci.layers import Member, TarLayer
from weightsmith.oci.tar import source_date_epoch
from weightsmith.recipe.schema import Recipe
from weightsmith.serving.devices import is_cpu
from weightsmith.serving.healthcheck import FOLDER, NAME
from weightsmith.steps.bases import base_inputs
from weightsmith.steps.tools import Tools


def wants_probe(recipe: Recipe) -> bool:
    """Say whether a recipe's images are to be asked when they start.

    So it is unless no set can come of it, its questions are secret, or `replay.probe` is off.
    """
    replay = recipe.replay
    asks = recipe.evaluate or replay.data or any(one.evaluate for one in recipe.adapters)
    return bool(asks) and replay.probe and replay.keep == "questions"


def probes_replay(recipe: Recipe, model: ModelFacts) -> bool:
    """Say whether manifests of a recipe's images ask the set when a container starts."""
    return wants_probe(recipe) and model.task.kind != "other"


def has_program(recipe: Recipe, model: ModelFacts, device: str) -> bool:
    """Say whether images of a recipe have the program: as their health check, or for that probe."""
    return is_cpu(device) or probes_replay(recipe, model)


def healthcheck_layers(
    platforms: Iterable[str], tools: Tools, *, optional: bool
) -> Mapping[str, TarLayer]:
    """Return the program's layer for each platform, compiled once on this machine.

    `optional`: the image's own health check is another, so the recipe can do without it. Raises
    EnvironmentFailure if the compiler cannot be downloaded or fails.
    """
    try:
        return {each: _layer(each, tools) for each in platforms}
    except EnvironmentFailure as error:
        without = "; `replay: {probe: false}` in the recipe does without the program" * optional
        raise EnvironmentFailure(error.message, hint=error.hint + without) from None


def _layer(platform: str, tools: Tools) -> TarLayer:
    stage = base_inputs(NAME, platform)

    def make(folder: Path) -> Mapping[str, JsonValue]:
        tools.make_engine_files(NAME, platform, folder, tools.progress)
        return {}

    tree = tools.store.produce(stage.key, stage.note, make).tree
    members = tuple(
        Member(
            path=f"{FOLDER.strip('/')}/{file.path}",
            size=file.size,
            mode=0o755 if file.path == NAME else 0o644,
            source=tree.source(file.path),
            digest=file.digest,
        )
        for file in tree.files
    )
    return TarLayer(members=members, epoch=source_date_epoch(), memo=tools.store.memo)
