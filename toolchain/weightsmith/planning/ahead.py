"""Whether quantizing and its gate run ahead of their turn, beside validation and references."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from weightsmith.ahead import Shares
from weightsmith.checkpoints.facts import read_facts
from weightsmith.planning.memory import proof_memory, quality_memory, quantize_memory
from weightsmith.planning.options import quantize_options, sources_to_merge
from weightsmith.planning.origins import origin_of
from weightsmith.planning.targets import can_make
from weightsmith.planning.tasks import tasks_of
from weightsmith.quantizers import of_format
from weightsmith.recipe_file import RecipeFile
from weightsmith.serving.targets import Target
from weightsmith.tools import Tools
from weightsmith.values import Json, Sources

_NOW, _AHEAD = ("validate", "reference"), ("quantize", "quality")


def shares(
    file: RecipeFile, targets: Sequence[Target], sources: Sources, tools: Tools
) -> Shares | None:
    """Return the memory of both sides while the first target's weights are made ahead.

    None if they are made in their turn: with one CPU or a GPU, whose memory nobody plans for two
    jobs; if their builder must be made first; or if both sides together need more than a job that
    can choose may fill. So without --memory, each side may use at least twice what it is known to
    need.
    """
    format_ = targets[0].format
    if not (tools.two_at_once() and format_.packed and can_make(format_)):
        return None
    now, ahead = _needs(file, targets, sources, tools)
    if not now or not tools.runner.ready(of_format(format_.name).builder):
        return None
    if not tools.memory.limit:
        return Shares(now=0, ahead=0)
    if now + ahead > tools.memory.budget:
        return None
    share = tools.memory.limit * ahead // (now + ahead)
    return Shares(now=tools.memory.limit - share, ahead=share)


def _needs(
    file: RecipeFile, targets: Sequence[Target], sources: Sources, tools: Tools
) -> tuple[int, int]:
    """Return the peaks of both sides in bytes; the first is 0 if nothing comes before."""
    recipe, tasks = file.recipe, tasks_of(file)
    validates = sources_to_merge(targets, sources).adapters and recipe.validation.enabled
    model, quantizer = read_facts(sources.base.tree.root), of_format(targets[0].format.name)
    now = proof_memory(model, sources, tasks, tools.memory) if validates or tasks else 0
    passes = (
        (origin_of(one, sources, recipe.merge), one.format)
        for one in targets  # those of one quantizer may be made in one pass
        if one.format.packed and can_make(one.format) and of_format(one.format.name) == quantizer
    )
    ahead = max(
        quantize_memory(
            origin.model, origin.size, quantize_options(file, format_, sources.base, tools)
        )
        for origin, format_ in passes
    )
    if recipe.quality.gate is not False:
        ahead = max(ahead, quality_memory(model, recipe.quality.tokens))
    return now, ahead


def peak_memory(
    todo: Sequence[Mapping[str, Json]],
    file: RecipeFile,
    targets: Sequence[Target],
    sources: Sources,
    tools: Tools,
) -> int:
    """Return the most memory of the stages of a forecast that are to do, some of them at once."""
    largest = max((int(row["peak_memory_bytes"]) for row in todo), default=0)
    stages = {row["stage"] for row in todo if row["target"] in ("", targets[0].name)}
    if not (stages.intersection(_NOW) and stages.intersection(_AHEAD)):
        return largest
    if shares(file, targets, sources, tools) is None:
        return largest
    return max(largest, sum(_needs(file, targets, sources, tools)))
