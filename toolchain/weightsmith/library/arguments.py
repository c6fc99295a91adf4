"""Converts callers' arguments: paths, texts and recipes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from weightsmith.core.errors import UsageError
from weightsmith.recipe.file import RecipeFile, check_recipe, read_recipe, with_settings
from weightsmith.recipe.schema import Recipe
from weightsmith.recipe.user_text import require_plain

AnyPath: TypeAlias = str | Path
Texts: TypeAlias = str | Sequence[str]
AnyRecipe: TypeAlias = AnyPath | Recipe | Mapping[str, Any]
"""A recipe file, a Recipe, or a mapping with a recipe file's keys."""


def recipe_of(recipe: AnyRecipe, settings: Texts) -> RecipeFile:
    """Return a checked recipe with `key.path=value` settings; raises UsageError."""
    if isinstance(recipe, str | Path):
        return read_recipe(path_of(recipe), texts_of(settings))
    if isinstance(recipe, Recipe):
        recipe = recipe.model_dump(by_alias=True, exclude_unset=True)
    require_plain(recipe, "the recipe", "docs/reference/recipe.md lists every key")
    checked = check_recipe(with_settings(recipe, texts_of(settings)), "the recipe")
    return RecipeFile(recipe=checked, folder=Path())


def path_of(given: AnyPath) -> Path:
    """Return a path with `~` expanded to the home folder.

    Raises UsageError for an empty text, which would be the current folder, and for one with NUL.
    """
    if not str(given) or "\0" in str(given):
        raise UsageError(
            f"{str(given)!r} is no path", hint="give a file or a folder; . is the current folder"
        )
    return Path(given).expanduser()


def source_of(given: AnyPath) -> str:
    """Return a folder's path, or a source such as `hf://owner/name` as it is."""
    return given if isinstance(given, str) and "://" in given else str(path_of(given))


def paths_of(given: AnyPath | Sequence[AnyPath]) -> tuple[Path, ...]:
    """Return paths as a tuple; a single path may be given without a list."""
    return (path_of(given),) if isinstance(given, str | Path) else tuple(map(path_of, given))


def texts_of(given: Texts) -> tuple[str, ...]:
    """Return texts as a tuple; a single text may be given without a list."""
    return (given,) if isinstance(given, str) else tuple(given)


def weights_of(given: Sequence[float] | None) -> tuple[float, ...] | None:
    """Return weights as a tuple, of whatever type of numbers they are."""
    return None if given is None else tuple(map(float, given))
