"""`invoke validate`: compare a merged checkpoint with its base and adapters."""

from __future__ import annotations

from weightsmith.api.commands.folders import base_folder, open_checkpoint, open_sources
from weightsmith.api.commands.requests import ValidateCommand
from weightsmith.evaluating.items import read_prompts
from weightsmith.stages.validate import BUILDER, validate
from weightsmith.steps.destinations import Unkept
from weightsmith.steps.tools import Tools
from weightsmith.validating.result import Validation


def validate_folders(asked: ValidateCommand, tools: Tools) -> Validation:
    """Compare a merged checkpoint with its sources; `options` say how it was merged.

    Raises CheckFailed, with the result as details, if the checkpoint differs from its sources,
    InputRefused if a folder is not a model or adapter, UsageError for invalid probes.
    """
    tools.runner.check(BUILDER)
    base = base_folder(asked.base, tools)
    sources = open_sources(base, asked.adapters, asked.factors, tools.store)
    checkpoint = open_checkpoint(asked.merged, tools.store)
    items = read_prompts(asked.probes) if asked.probes else ()
    return validate(checkpoint, sources, asked.options, items, Unkept(tools), tools).value
