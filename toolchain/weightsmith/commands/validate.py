"""`invoke validate`: a merged checkpoint folder against its base and adapters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from weightsmith.checkpoints.folder import check_adapter_folder, check_model_folder
from weightsmith.evaluating.items import read_prompts
from weightsmith.stages.validate import BUILDER, job, mixture, require_passed, scope
from weightsmith.tools import Tools
from weightsmith.values import Json


def validate_folders(
    base: Path,
    adapters: tuple[tuple[Path, float], ...],
    merged: Path,
    probes: Path | None,
    options: Mapping[str, Json],
    tools: Tools,
) -> Mapping[str, Json]:
    """Return what was compared and found; `options` say how it was merged.

    Raises CheckFailed with the same as details where the folder differs from base and adapters,
    InputRefused for a folder that is none, UsageError for the probes.
    """
    tools.runner.check(BUILDER)
    check_model_folder(base)
    check_model_folder(merged)
    for folder, _ in adapters:
        check_adapter_folder(folder)
    items = read_prompts(probes) if probes else ()
    tools.progress.stage("validate", f"{merged} against {base} and {len(adapters)} adapter(s)")
    tools.runner.prepare(BUILDER, tools.progress)
    with tools.scratch() as output:
        result = tools.runner.run(
            job(
                base.resolve(),
                [(folder.resolve(), weight) for folder, weight in adapters],
                merged.resolve(),
                items,
                scope=scope(options["method"], options["space"], options["quantized_base"]),
                mixture=mixture(*(options[key] for key in ("method", "space", "density", "rank"))),
                output=output,
            ),
            tools.progress,
        )
    tools.progress.finish("validate", float(result["seconds"]), cached=False)
    for found in result["findings"]:
        if found["severity"] == "warning":
            tools.progress.warn(str(found["message"]))
    require_passed(result, str(merged))
    return result
