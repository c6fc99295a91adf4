"""The recipe that a command is asked to build: of a file, of Python, or of --base and --adapter."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel

from weightsmith.api.commands.requests import RecipeCommand
from weightsmith.core.errors import UsageError
from weightsmith.recipe.file import RecipeFile, check_recipe, read_recipe, with_settings
from weightsmith.recipe.schema import Recipe
from weightsmith.recipe.user_text import require_plain


def recipe_of(asked: RecipeCommand) -> RecipeFile:
    """Return the checked recipe, changed by --set and then by flags; raises UsageError."""
    settings, recipe = [*asked.settings, *_flags(asked)], asked.recipe
    if asked.base:
        if recipe:
            hint = "use --set base.source=…"
            raise UsageError("--recipe and --base exclude each other", hint=hint)
        recipe = {
            "name": _name_of(asked.adapters[-1] if asked.adapters else asked.base),
            "base": {"source": asked.base},
            "adapters": [{"source": source} for source in asked.adapters],
        }
    elif asked.adapters:
        raise UsageError("--adapter needs --base", hint="or name both in a recipe")
    elif recipe is None or isinstance(recipe, str | Path):
        return read_recipe(Path(recipe or "recipe.yaml"), settings)
    if isinstance(recipe, Recipe):
        recipe = recipe.model_dump(by_alias=True, exclude_unset=True)
    where = "the command line" if asked.base else "the recipe"
    require_plain(recipe, where, "docs/reference/recipe.md lists every key")
    return RecipeFile(recipe=check_recipe(with_settings(recipe, settings), where), folder=Path())


def _flags(asked: RecipeCommand) -> Iterator[str]:
    """Yield what flags set of the recipe, as `key.path=value` settings."""
    yield from given("serve", asked.serve)
    yield from given("quantize", asked.quantize)
    if asked.kinds:
        yield f"outputs.kinds=[{', '.join(asked.kinds)}]"


def given(key: str, section: BaseModel) -> list[str]:
    """Return what was given of a section as `key.path=value` settings of a recipe."""
    values = section.model_dump(mode="json", exclude_unset=True)
    return [f"{key}.{name}={json.dumps(value)}" for name, value in values.items()]


def _name_of(source: str) -> str:
    """Return a recipe name from a source's last part."""
    last = source.rstrip("/").rpartition("/")[2].partition("==")[0].lower()
    cleaned = "".join(c if c.isascii() and c.isalnum() else "-" for c in last).strip("-")
    return "-".join(part for part in cleaned.split("-") if part) or "model"
