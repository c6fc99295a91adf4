"""The layer with the program that asks an image its replay set when a container starts.

Without it and without that probe, a pod that answers otherwise would get requests. It is the same
in all images of a platform.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from weightsmith.core.errors import EnvironmentFailure
from weightsmith.core.values import JsonValue
from weightsmith.models.facts import ModelFacts
from weightsmith.oci.layers import Member, TarLayer
from weightsmith.oci.tar import source_date_epoch
from weightsmith.recipe.schema import Recipe
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
    """Say whether images of a recipe have the program, and their manifests call it."""
    return wants_probe(recipe) and model.task.kind == "generate"


def healthcheck_layer(platform: str, tools: Tools) -> TarLayer:
    """Return the program for a platform, compiled once on this machine.

    Raises EnvironmentFailure if the compiler cannot be downloaded or fails.
    """
    stage = base_inputs(NAME, platform)

    def make(folder: Path) -> Mapping[str, JsonValue]:
        try:
            tools.make_engine_files(NAME, platform, folder, tools.progress)
        except EnvironmentFailure as error:
            hint = (
                f"{error.hint}; `replay: {{probe: false}}` in the recipe does without the program"
            )
            raise EnvironmentFailure(error.message, hint=hint) from None
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
