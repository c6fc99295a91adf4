"""`invoke validate`: compare a merged checkpoint with its base and adapters."""

from __future__ import annotations

from pathlib import Path

from weightsmith.commands.folders import base_folder, open_checkpoint, open_sources
from weightsmith.evaluating.items import read_prompts
from weightsmith.merge_options import Merge
from weightsmith.stages.validate import BUILDER, validate
from weightsmith.steps.destinations import Unkept
from weightsmith.tools import Tools
from weightsmith.validating.result import Validation


def validate_folders(
    base: Path | str,
    adapters: tuple[tuple[Path, float], ...],
    merged: Path,
    probes: Path | None,
    options: Merge,
    tools: Tools,
) -> Validation:
    """Compare a merged checkpoint with its sources; `options` say how it was merged.

    Raises CheckFailed, with the result as details, if the checkpoint differs from its sources,
    InputRefused if a folder is not a model or adapter, UsageError for invalid probes.
    """
    tools.runner.check(BUILDER)
    folders, weights = [folder for folder, _ in adapters], [weight for _, weight in adapters]
    sources = open_sources(base_folder(base, tools), folders, weights, tools.store)
    checkpoint = open_checkpoint(merged, tools.store)
    items = read_prompts(probes) if probes else ()
    return validate(checkpoint, sources, options, items, Unkept(tools), tools).value
