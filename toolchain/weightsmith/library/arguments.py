"""What callers give: paths and recipes in any form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from weightsmith.commands.arguments import one_each
from weightsmith.recipe import Recipe
from weightsmith.recipe_file import RecipeFile, check_recipe, read_recipe, with_settings

AnyPath: TypeAlias = str | Path
Texts: TypeAlias = str | Sequence[str]
AnyRecipe: TypeAlias = AnyPath | Recipe | Mapping[str, Any]
"""A file, a recipe, or the mapping that a file would hold."""


def recipe_of(recipe: AnyRecipe, settings: Texts) -> RecipeFile:
    """Return a checked recipe with `key.path=value` settings; raises UsageError."""
    if isinstance(recipe, str | Path):
        return read_recipe(path_of(recipe), texts_of(settings))
    if isinstance(recipe, Recipe):
        recipe = recipe.model_dump(by_alias=True, exclude_unset=True)
    checked = check_recipe(with_settings(recipe, texts_of(settings)), "the recipe")
    return RecipeFile(recipe=checked, folder=Path())


def path_of(given: AnyPath) -> Path:
    """Return a path whose `~` is the home folder, as a shell would have it."""
    return Path(given).expanduser()


def paths_of(given: AnyPath | Sequence[AnyPath]) -> tuple[Path, ...]:
    """Return one path or several: a text is a sequence too, of letters."""
    return (path_of(given),) if isinstance(given, str | Path) else tuple(map(path_of, given))


def texts_of(given: Texts) -> tuple[str, ...]:
    """Return one text or several."""
    return (given,) if isinstance(given, str) else tuple(given)


def weights_of(given: Sequence[float] | None, adapters: Sequence[Path]) -> tuple[float, ...]:
    """Return a weight per adapter, all 1 where none is given; UsageError for another number."""
    count = len(adapters)
    return one_each([1.0] * count if given is None else [float(w) for w in given], count)
