"""Whether merging is right for a recipe, from its measurement and earlier builds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from weightsmith.build_record import read_build
from weightsmith.recipe_file import RecipeFile
from weightsmith.serving.advice import advise
from weightsmith.serving.targets import Target
from weightsmith.stages import merge as merging
from weightsmith.tools import Tools
from weightsmith.values import Json, Sources


def advice_for(
    file: RecipeFile, targets: Sequence[Target], sources: Sources, dist: Path, tools: Tools
) -> Mapping[str, Json]:
    """Return whether to merge, from the recipe, the merge's measurement and earlier builds."""
    found = merging.find(sources, file.recipe.merge, tools.store, files=False)
    return advise(
        adapters=len(sources.adapters),
        packed=any(target.format.packed for target in targets),
        changes=_changes(dist / file.recipe.name),
        conflicts=found.details.get("conflicts") or () if found and sources.adapters else (),
    )


def _changes(folder: Path) -> int:
    """Return how many different sets of adapters were built in this folder within a week."""
    since, seen = (datetime.now(UTC) - timedelta(days=7)).isoformat(), set()
    for path in folder.glob("*/*/build.json"):
        try:
            record = read_build(path.parent)
        except (OSError, ValueError):
            continue
        if record.created >= since:
            seen.add(tuple(adapter.digest for adapter in record.adapters))
    return len(seen)
