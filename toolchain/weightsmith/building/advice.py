"""Whether merging is right for a recipe, from its measurement and earlier builds."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

from weightsmith.building.request import BuildRequest
from weightsmith.core.values import Json, Sources
from weightsmith.evaluating.build_record import read_build
from weightsmith.serving.advice import advise
from weightsmith.stages.merge import find
from weightsmith.steps.tools import Tools


def advice_for(request: BuildRequest, sources: Sources, tools: Tools) -> Mapping[str, Json]:
    """Return whether to merge, from the recipe, the merge's measurement and earlier builds."""
    recipe = request.file.recipe
    found = find(sources, recipe.merge, tools.store, files=False)
    return advise(
        adapters=len(sources.adapters),
        packed=any(target.format.packed for target in request.targets),
        changes=_changes(request.dist / recipe.name),
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
