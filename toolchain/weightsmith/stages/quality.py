"""Checkpoint and Artifact -> quality loss: run held-out text through both, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from weightsmith.core.errors import CheckFailed
from weightsmith.core.jobs import Input, QualityJob, Virtual
from weightsmith.core.resources import builder_pins
from weightsmith.core.time_limits import job_seconds
from weightsmith.core.values import (
    Artifact,
    Checkpoint,
    Digest,
    Format,
    JsonValue,
    StageInputs,
    Writable,
)
from weightsmith.forward.memory import COMPARING, DEQUANTIZED, LayerTime, WalkSize, model_pass_bytes
from weightsmith.models.facts import ModelFacts, read_facts
from weightsmith.models.safetensors import read_header
from weightsmith.quantizers import formats, of_format
from weightsmith.quantizers.calibration import Texts, texts_of
from weightsmith.quantizers.quality.limits import limits_for, refusal
from weightsmith.quantizers.quality.result import QualityResult, TextsUsed
from weightsmith.recipe.schema import Quality
from weightsmith.steps.destinations import Documents, InStore
from weightsmith.steps.sizes import estimated_bytes
from weightsmith.steps.stage_result import StageResult, Timer
from weightsmith.steps.step import (
    NOT_YET,
    Foreseen,
    ForeseenWeights,
    Foresight,
    Results,
    State,
    Step,
    TargetStep,
)
from weightsmith.steps.tools import Tools

BUILDER = "merge"
RECIPE_NUMBER = 4
_MEMORY_BYTES = 8 << 30
"""Memory limit of the container, without the weights."""
_TOKEN_BYTES = 4 << 20
"""Bytes for one token's logits of both models and their comparison, for a large vocabulary."""
_PADDED = 2
"""Tokens in the batch per token of the texts, which are of different lengths."""
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
    options: Quality,
    to: Documents,
    tools: Tools,
) -> StageResult[QualityResult | None]:
    """Return an artifact's loss, limits and verdict; None if it is not quantized.

    quantizers/quality/measure.py defines the measures; they are cached per artifact and text. The
    unquantized checkpoint is not measured. `skipped` says why an architecture cannot be measured.
    Raises CheckFailed for weights that are not finite.
    """
    timer = Timer("quality", f"{artifact.format.name}, {len(texts.held_out)} texts", tools)
    if not artifact.format.packed:
        return timer.done(None, cached=True)
    if reason := _needless(artifact.format, checkpoint, options):
        return timer.done(QualityResult(skipped=reason), cached=True)
    document = to.document(
        partial(inputs, checkpoint.digest, artifact.digest, texts, options.tokens),
        _RESULT,
        partial(_run, checkpoint, artifact, texts, options.tokens, tools),
    )
    found = QualityResult.from_json(document.value)
    if found.skipped:
        tools.progress.warn(f"quality not measured: {found.skipped}")
    limits = limits_for(
        artifact.format,
        options,
        general=bool(texts.general),
        perplexity=found.loss.perplexity_reference if found.loss else 1.0,
    )
    used = TextsUsed(
        source=texts.source,
        texts=len(texts.calibration),
        held_out=len(texts.held_out),
        general=texts.general,
        digest=texts.calibration_digest,
        held_out_digest=texts.held_out_digest,
    )
    return timer.done(found.judged(limits, used), cached=document.cached)


def quality_fault(
    format_: Format, found: QualityResult | None, options: Quality
) -> CheckFailed | None:
    """Return an error if a format's loss is over its limits, else None."""
    if not found or not found.exceeded or options.gate is not True:
        return None
    return refusal(format_, found, larger_than(format_))


def larger_than(format_: Format) -> tuple[str, ...]:
    """Return the usual formats of the same kind with more bits per weight, smallest first."""
    known = (each for name, each in formats().items() if name in _USUAL)
    larger = sorted(
        (each.bits_per_weight, each.name)
        for each in known
        if each.kind == format_.kind and each.bits_per_weight > format_.bits_per_weight
    )
    return tuple(name for _, name in larger[:2])


def _needless(format_: Format, checkpoint: Checkpoint, options: Quality) -> str:
    """Return why a format need not be measured; "" if it must be."""
    if options.gate is False:
        return "quality.gate is off"
    model = read_facts(checkpoint.tree.texts)
    if model.task.kind != "generate":
        return f"{model.architecture} {model.task.does}, and the gate compares texts"
    if options.gate is True and (kept := _KEPT.get(format_.name)):
        names = [f.path for f in checkpoint.tree.files if f.path.endswith(".safetensors")]
        headers = [read_header(checkpoint.tree.header(name)) for name in names]
        tensors = [tensor for header in headers for tensor in header.tensors]
        # Vectors are kept in 32 bits.
        if tensors and all(t.dtype in (kept if len(t.shape) > 1 else _FLOATS) for t in tensors):
            return f"{format_.name} keeps every bit of this checkpoint"
    return ""


def _run(
    checkpoint: Checkpoint,
    artifact: Artifact,
    texts: Texts,
    tokens: int,
    tools: Tools,
    folder: Path,
) -> JsonValue:
    quantizer = of_format(artifact.format.name)
    if quantizer.view is None:
        reason = f"{quantizer.name} has no view for the quality gate"
        return QualityResult(skipped=reason).to_json()
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
    return QualityResult.from_json(tools.runner.run(job, tools.progress)).to_json()


def quality_memory(model: ModelFacts, tokens: int) -> int:
    """Return the peak of the quality gate in bytes: both models, a few rows of each matrix."""
    walk = WalkSize(views=2, rows=8, tokens=_PADDED * tokens)
    return model_pass_bytes(model, walk) + DEQUANTIZED + COMPARING


@dataclass(frozen=True, eq=False, kw_only=True)
class QualityStep(TargetStep[QualityResult | None, None]):
    """Measures what quantizing lost, and judges it; None if nothing was quantized."""

    name = "quality"
    recipe_number = RECIPE_NUMBER
    prefetched = True
    way_out = "set quality.gate to false, or quality.tokens to fewer"

    checkpoint: Step[Checkpoint, ForeseenWeights]
    weights: Step[Artifact, ForeseenWeights]

    @property
    def format(self) -> Format:
        """The format of the target's weights, or of the base that adapters lie beside."""
        return self.of.target.format.without_adapters

    @property
    def options(self) -> Writable:
        """The limits."""
        return self.file.recipe.quality.model_dump(mode="json")

    @property
    def shared_as(self) -> str:
        """Engines that load one format share its weights."""
        return "weights" if self.format.packed else ""

    def foresee(self, seen: Foresight) -> Foreseen[None]:
        """Return its row, if the format is measured."""
        wanted, format_ = self.file.recipe.quality, self.format
        if not format_.packed or format_.name not in formats() or wanted.gate is False:
            return Foreseen(value=None)
        checkpoint, made = seen[self.checkpoint], seen[self.weights]
        if checkpoint.model.task.kind != "generate":
            return Foreseen(value=None)
        state, size = State(cached=False, why=NOT_YET), made.tree.size if made.tree else 0
        if checkpoint.tree and made.tree:
            digests = checkpoint.tree.digest, made.tree.digest
            state = seen.state(self, inputs(*digests, texts_of(self.file), wanted.tokens))
        size = size or estimated_bytes(checkpoint.size, format_, checkpoint.model)
        memory = quality_memory(checkpoint.model, wanted.tokens)
        row = self.row(state, read=checkpoint.size + size, memory=memory)
        return Foreseen(value=None, rows=(row,))

    def run(self, have: Results, tools: Tools) -> StageResult[QualityResult | None]:
        """Return the loss with its limits."""
        checkpoint, artifact = have[self.checkpoint], have[self.weights]
        limits, texts = self.file.recipe.quality, texts_of(self.file)
        return quality(checkpoint, artifact, texts, limits, InStore(tools.store), tools)

    def judge(self, have: Results) -> None:
        """Raise CheckFailed if quantizing lost too much."""
        format_ = have[self.weights].format
        if fault := quality_fault(format_, have[self], self.file.recipe.quality):
            raise fault

    def seconds(self, layer: LayerTime, _seen: Foresight) -> float | None:
        """Return how long both models read the texts."""
        tokens = self.file.recipe.quality.tokens
        return 2 * layer.passed(_PADDED * tokens, tokens)
