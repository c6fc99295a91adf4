"""Whether a target's dequantized weights answer in place of its image, and what that costs."""

from __future__ import annotations

from collections.abc import Sequence

from weightsmith.checkpoints.facts import ModelFacts
from weightsmith.evaluating.results import RecipeTask
from weightsmith.planning.memory import dequantized_memory
from weightsmith.planning.platforms import platforms_of
from weightsmith.planning.targets import can_make
from weightsmith.platforms import host_platform
from weightsmith.recipe_file import RecipeFile
from weightsmith.serving.targets import Target
from weightsmith.stages import dequantized as stage
from weightsmith.stages.base import base_reference
from weightsmith.starting import missing_device
from weightsmith.tools import Tools
from weightsmith.values import Json, Tree


def forecast_dequantized(
    file: RecipeFile,
    target: Target,
    device: str,
    tasks: Sequence[RecipeTask],
    model: ModelFacts,
    made: tuple[Tree | None, Tree | None],
    tools: Tools,
) -> dict[str, Json] | None:
    """Return the stage's row of a forecast without what it reads; None if there is no such stage.

    `made` are the checkpoint and the artifact, None if they do not exist yet.
    """
    if not tasks or not can_make(target.format) or not stage.can_answer(target.format):
        return None
    if not (why := _why_not_started(file, target, device, tools)):
        return None
    row: dict[str, Json] = {
        "target": target.name,
        "memory": dequantized_memory(model, tasks, tools.memory),
    }
    checkpoint, artifact = made
    if not checkpoint or not artifact:
        return {**row, "cached": False, "why": f"{why}; its weights do not exist yet"}
    keys = [stage.inputs(checkpoint.digest, artifact.digest, one.task).key for one in tasks]
    cached = all(tools.store.find(key) for key in keys)
    return {**row, "cached": cached, "why": "" if cached else why}


def _why_not_started(file: RecipeFile, target: Target, device: str, tools: Tools) -> str:
    """Return why this machine will not start a target's image; "" if it will.

    If the platforms are not known yet, this machine's is taken for one of them.
    """
    platforms = platforms_of(file, base_reference(target.engine, device, file.recipe.image.base))
    if platforms and host_platform() not in platforms:
        return f"its image, for {' and '.join(platforms)}, cannot be started here"
    missing = missing_device(device, tools)
    return f"its image is {missing}" if missing else ""
