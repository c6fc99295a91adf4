"""Plans and renders a target of a recipe."""

from __future__ import annotations

from dataclasses import replace

from weightsmith.checkpoints.facts import ModelFacts
from weightsmith.planning.options import serve_options
from weightsmith.provenance.labels import reference
from weightsmith.recipe_file import RecipeFile
from weightsmith.serving.engine import ServedAdapter
from weightsmith.serving.plan import ServingConfig
from weightsmith.serving.projector import Projector
from weightsmith.serving.targets import Target
from weightsmith.stages.render import render
from weightsmith.values import Digest


def serving_config(
    file: RecipeFile,
    target: Target,
    model: ModelFacts,
    weight_bytes: int,
    *,
    weights: str,
    made_from: tuple[Digest, ...],
    adapters: tuple[ServedAdapter, ...] = (),
    projector: Projector | None = None,
    notes: tuple[str, ...] = (),
) -> ServingConfig:
    """Plan and render a target; `weights` is the served file, "" if it does not exist yet.

    `weight_bytes` are with the projector, and without the adapters.
    """
    recipe = file.recipe
    return render(
        target=target,
        name=recipe.name,
        version=recipe.version,
        model=model,
        model_file=weights,
        weight_bytes=weight_bytes + sum(adapter.weight_bytes for adapter in adapters),
        options=replace(serve_options(recipe.serve), adapters=adapters),
        image=reference(recipe, target.name),
        made_from=made_from,
        projector=projector,
        notes=notes,
    )
