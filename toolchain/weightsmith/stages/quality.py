"""Checkpoint and Artifact -> quality loss: run held-out text through both, layer by layer."""

from __future__ import annotations

from pathlib import Path

from weightsmith.destinations import Documents
from weightsmith.errors import CheckFailed
from weightsmith.jobs import Input, QualityJob
from weightsmith.outcome import Outcome, Timer
from weightsmith.quality.limits import limits_for, refusal
from weightsmith.quality.result import Quality
from weightsmith.quantizers import of_format
from weightsmith.quantizers.calibration import Texts
from weightsmith.recipe import Quality as Limits
from weightsmith.resources import builder_pins
from weightsmith.time_limits import job_seconds
from weightsmith.tools import Tools
from weightsmith.values import Artifact, Checkpoint, Digest, Format, StageInputs

BUILDER = "merge"
RECIPE_NUMBER = 2
_MEMORY_BYTES = 8 << 30
"""Memory limit of the container, without the weights."""
_TOKEN_BYTES = 4 << 20
"""Bytes for one token's logits of both models and their comparison, for a large vocabulary."""
_RESULT = "quality.json"


def inputs(checkpoint: Digest, artifact: Digest, texts: Texts, tokens: int) -> StageInputs:
    """Return everything that a measured quality depends on; limits are applied afterwards."""
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
    options: Limits,
    to: Documents,
    tools: Tools,
) -> Outcome[Quality | None]:
    """Return an artifact's loss, limits and verdict; None if it is not quantized.

    `weightsmith.quality.measure` defines the measures; they are cached per artifact and text. The
    unquantized checkpoint is not measured. `skipped` says why an architecture cannot be measured.
    Raises CheckFailed for weights that are not finite.
    """
    timer = Timer("quality", f"{artifact.format.name}, {len(texts.held_out)} texts", tools)
    if not artifact.format.packed:
        return timer.done(None, cached=True)
    document = to.document(
        lambda: inputs(checkpoint.digest, artifact.digest, texts, options.tokens),
        _RESULT,
        lambda folder: _run(folder, checkpoint, artifact, texts, options.tokens, tools).to_json(),
    )
    found = Quality.from_json(document.value)
    if found.skipped:
        tools.progress.warn(f"quality not measured: {found.skipped}")
    limits = limits_for(artifact.format, options, general=bool(texts.general))
    return timer.done(found.judged(limits, texts.described()), cached=document.cached)


def quality_fault(format_: Format, found: Quality | None, options: Limits) -> CheckFailed | None:
    """Return an error if a format's loss is over its limits, else None."""
    return refusal(format_, found) if found and found.exceeded and options.gate else None


def _run(
    folder: Path,
    checkpoint: Checkpoint,
    artifact: Artifact,
    texts: Texts,
    tokens: int,
    tools: Tools,
) -> Quality:
    quantizer = of_format(artifact.format.name)
    if quantizer.view is None:
        return Quality(skipped=f"{quantizer.name} has no view for the quality gate")
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
        # The gate keeps one layer in float32; long texts or chat templates may need more.
        memory_bytes=_MEMORY_BYTES + 2 * size + tokens * _TOKEN_BYTES,
        seconds=job_seconds(size, tokens=tokens),
    )
    return Quality.from_json(tools.runner.run(job, tools.progress))
