"""What a recipe wants of each format: options, calibration text, and the gate's limits."""

from __future__ import annotations

from dataclasses import replace

from weightsmith.errors import CheckFailed
from weightsmith.evaluating.limits import judge, limits_for, refusal
from weightsmith.planning.options import texts_of
from weightsmith.recipe_file import RecipeFile
from weightsmith.stages.quality import quality
from weightsmith.tools import Tools
from weightsmith.values import Artifact, Checkpoint


def network_in_jobs(checkpoint: Checkpoint, artifact: Artifact | None, tools: Tools) -> bool:
    """Say whether a job had the machine's network: one of now, or one that made what is cached."""
    made = (checkpoint.details, artifact.details if artifact else {})
    return tools.runner.networked or any(details.get("network_in_jobs") for details in made)


def with_quality(
    file: RecipeFile, checkpoint: Checkpoint, artifact: Artifact, tools: Tools
) -> Artifact:
    """Return the artifact with its measured `quality`, limits and verdict among its details."""
    if not artifact.format.packed:
        return artifact
    wanted = file.recipe.quality
    texts = texts_of(file)
    found = dict(quality(checkpoint, artifact, texts, wanted.tokens, tools))
    if "skipped" in found:
        tools.progress.warn(f"quality not measured: {found['skipped']}")
    else:
        general = bool(texts.general)
        verdict = judge(found, limits_for(artifact.format, wanted, general=general))
        found |= {"limits": verdict.limits, "exceeded": verdict.exceeded}
        found["calibration"] = texts.described()
    return replace(artifact, details={**artifact.details, "quality": found})


def quality_fault(file: RecipeFile, artifact: Artifact) -> CheckFailed | None:
    """Return the error of an artifact that lost more than its limits; None for any other."""
    found = artifact.details.get("quality", {})
    if not found.get("exceeded") or not file.recipe.quality.gate:
        return None
    return refusal(artifact.format, found)
