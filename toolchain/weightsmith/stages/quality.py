"""Checkpoint + Artifact -> how much was lost: held-out text through both, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from weightsmith.destinations import Documents
from weightsmith.errors import CheckFailed
from weightsmith.evaluating.limits import judge, limits_for, refusal
from weightsmith.jobs import Input, QualityJob
from weightsmith.outcome import Outcome, Timer
from weightsmith.quantizers import of_format
from weightsmith.quantizers.calibration import Texts
from weightsmith.recipe import Quality
from weightsmith.resources import builder_pins
from weightsmith.time_limits import job_seconds
from weightsmith.tools import Tools
from weightsmith.values import Artifact, Checkpoint, Digest, Format, Json, StageInputs

BUILDER = "merge"
RECIPE_NUMBER = 2
_MEMORY_BYTES = 8 << 30
"""Limit of the container beside the weights."""
_TOKEN_BYTES = 4 << 20
"""For a token's logits, of both sides and while they are compared, in a large vocabulary."""
_RESULT = "quality.json"


def inputs(checkpoint: Digest, artifact: Digest, texts: Texts, tokens: int) -> StageInputs:
    """Return all that a measured quality depends on; limits are applied to it afterwards."""
    return StageInputs(
        stage="quality",
        recipe_number=RECIPE_NUMBER,
        inputs={
            "checkpoint": checkpoint,
            "artifact": artifact,
            "texts": texts.held_out_digest,
            "tokens": tokens,
            "builder": builder_pins(BUILDER),
        },
    )


def quality(
    checkpoint: Checkpoint,
    artifact: Artifact,
    texts: Texts,
    options: Quality,
    to: Documents,
    tools: Tools,
) -> Outcome[Artifact]:
    """Return the artifact with `quality` among its details: what was lost, limits and verdict.

    `weightsmith.quality.measure` says what is measured, once per artifact and text; nothing of the
    merged checkpoint itself. `skipped` says why an architecture cannot be measured. Raises
    CheckFailed for weights that are no numbers.
    """
    timer = Timer("quality", f"{artifact.format.name}, {len(texts.held_out)} texts", tools)
    if not artifact.format.packed:
        return timer.done(artifact, cached=True)
    document = to.document(
        lambda: inputs(checkpoint.digest, artifact.digest, texts, options.tokens),
        _RESULT,
        lambda folder: _run(folder, checkpoint, artifact, texts, options.tokens, tools),
    )
    found = _judged(document.value, artifact.format, texts, options, tools)
    judged = replace(artifact, details={**artifact.details, "quality": found})
    return timer.done(judged, cached=document.cached)


def quality_fault(artifact: Artifact, options: Quality) -> CheckFailed | None:
    """Return the error of an artifact that lost more than its limits; None for any other."""
    found = artifact.details.get("quality", {})
    return refusal(artifact.format, found) if found.get("exceeded") and options.gate else None


def _judged(
    found: Mapping[str, Json], format_: Format, texts: Texts, options: Quality, tools: Tools
) -> Mapping[str, Json]:
    if "skipped" in found:
        tools.progress.warn(f"quality not measured: {found['skipped']}")
        return found
    verdict = judge(found, limits_for(format_, options, general=bool(texts.general)))
    return {
        **found,
        "limits": verdict.limits,
        "exceeded": verdict.exceeded,
        "calibration": texts.described(),
    }


def _run(
    folder: Path,
    checkpoint: Checkpoint,
    artifact: Artifact,
    texts: Texts,
    tokens: int,
    tools: Tools,
) -> Mapping[str, Json]:
    quantizer = of_format(artifact.format.name)
    if quantizer.view is None:
        return {"skipped": f"{quantizer.name} has no view for the quality gate"}
    tools.runner.prepare(BUILDER, tools.progress)
    size = sum(path.stat().st_size for path in checkpoint.tree.root.glob("*.safetensors"))
    job = QualityJob(
        builder=BUILDER,
        model=Input.tree(checkpoint.tree),
        artifact=Input.tree(artifact.tree),
        quantizer=quantizer.name,
        texts=texts.held_out,
        tokens=tokens,
        output=folder,
        # The gate holds a layer in float32; a text or a template of the model's may ask for more.
        memory_bytes=_MEMORY_BYTES + 2 * size + tokens * _TOKEN_BYTES,
        seconds=job_seconds(size, tokens=tokens),
    )
    return tools.runner.run(job, tools.progress)
