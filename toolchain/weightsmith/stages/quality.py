"""Checkpoint and Artifact -> quality loss: run held-out text through both, layer by layer."""

from __future__ import annotations

from pathlib import Path

from weightsmith.checkpoints.safetensors import read_header
from weightsmith.destinations import Documents
from weightsmith.errors import CheckFailed
from weightsmith.job_inputs import Input, Virtual
from weightsmith.jobs import QualityJob
from weightsmith.outcome import Outcome, Timer
from weightsmith.quality.limits import limits_for, refusal
from weightsmith.quality.result import Quality, TextsUsed
from weightsmith.quantizers import formats, of_format
from weightsmith.quantizers.calibration import Texts
from weightsmith.recipe import Quality as Limits
from weightsmith.resources import builder_pins
from weightsmith.time_limits import job_seconds
from weightsmith.tools import Tools
from weightsmith.values import Artifact, Checkpoint, Digest, Format, StageInputs

BUILDER = "merge"
RECIPE_NUMBER = 4
_MEMORY_BYTES = 8 << 30
"""Memory limit of the container, without the weights."""
_TOKEN_BYTES = 4 << 20
"""Bytes for one token's logits of both models and their comparison, for a large vocabulary."""
_RESULT = "quality.json"
_FLOATS = ("F32", "BF16", "F16")
_KEPT = {"f32": _FLOATS, "bf16": ("BF16",), "f16": ("F16",)}
"""Format -> types of matrices that it keeps exactly."""
_USUAL = frozenset({"q3_k_m", "q4_k_m", "q5_k_m", "q6_k", "q8_0", "f16"})
"""GGUF's types that a hint names."""


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
    if reason := _needless(artifact.format, checkpoint, options):
        return timer.done(Quality(skipped=reason), cached=True)
    document = to.document(
        lambda: inputs(checkpoint.digest, artifact.digest, texts, options.tokens),
        _RESULT,
        lambda folder: _run(folder, checkpoint, artifact, texts, options.tokens, tools).to_json(),
    )
    found = Quality.from_json(document.value)
    if found.skipped:
        tools.progress.warn(f"quality not measured: {found.skipped}")
    limits = limits_for(
        artifact.format,
        options,
        general=bool(texts.general),
        perplexity=found.loss.perplexity_reference if found.loss else 1.0,
    )
    return timer.done(found.judged(limits, _used(texts)), cached=document.cached)


def _used(texts: Texts) -> TextsUsed:
    return TextsUsed(
        source=texts.source,
        texts=len(texts.calibration),
        held_out=len(texts.held_out),
        general=texts.general,
        digest=texts.calibration_digest,
        held_out_digest=texts.held_out_digest,
    )


def quality_fault(format_: Format, found: Quality | None, options: Limits) -> CheckFailed | None:
    """Return an error if a format's loss is over its limits, else None."""
    if not found or not found.exceeded or options.gate is not True:
        return None
    return refusal(format_, found, larger_than(format_))


def larger_than(format_: Format) -> tuple[str, ...]:
    """Return the usual formats of the same kind with more bits per weight, smallest first."""
    known = [each for name, each in formats().items() if name in _USUAL]
    larger = [
        each
        for each in known
        if each.kind == format_.kind and each.bits_per_weight > format_.bits_per_weight
    ]
    return tuple(each.name for each in sorted(larger, key=lambda each: each.bits_per_weight)[:2])


def _needless(format_: Format, checkpoint: Checkpoint, options: Limits) -> str:
    """Return why a format need not be measured; "" if it must be."""
    if options.gate is False:
        return "quality.gate is off"
    if options.gate is True and (kept := _KEPT.get(format_.name)):
        names = [f.path for f in checkpoint.tree.files if f.path.endswith(".safetensors")]
        headers = [read_header(checkpoint.tree.header(name)) for name in names]
        tensors = [tensor for header in headers for tensor in header.tensors]
        # Vectors are kept in 32 bits.
        if tensors and all(t.dtype in (kept if len(t.shape) > 1 else _FLOATS) for t in tensors):
            return f"{format_.name} keeps every bit of this checkpoint"
    return ""


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
    size = checkpoint.tree.weight_bytes
    job = QualityJob(
        builder=BUILDER,
        model=Input.checkpoint(checkpoint),
        virtual=Virtual.of(checkpoint),
        artifact=Input.tree(artifact.tree),
        quantizer=quantizer.name,
        texts=texts.held_out,
        tokens=tokens,
        output=folder,
        # The gate keeps one matrix of each model; long texts or chat templates may need more.
        memory_bytes=_MEMORY_BYTES + 2 * size + tokens * _TOKEN_BYTES,
        seconds=job_seconds(size, tokens=tokens),
        use_gpu=True,
    )
    return Quality.from_json(tools.runner.run(job, tools.progress))
