"""How much memory each stage of a build needs, and whether there is that much."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from weightsmith.checkpoints.facts import ModelFacts
from weightsmith.errors import EnvironmentFailure, InputRefused
from weightsmith.evaluating.asking import LETTERS, walk_of
from weightsmith.evaluating.results import RecipeTask
from weightsmith.evaluating.subjects import subjects
from weightsmith.evaluating.walks import Unit, asked_of, once, planned_bytes
from weightsmith.forward.memory import (
    BATCH_TOKENS,
    START,
    Walk,
    single_pass_bytes,
    token_bytes,
    walk_bytes,
)
from weightsmith.quantizers import of_format
from weightsmith.quantizers.calibration import Texts
from weightsmith.quantizers.gguf_calibration import WALK_TOKENS
from weightsmith.quantizers.running import BLOCK
from weightsmith.serving.memory import human
from weightsmith.stages import quantize as quantizing
from weightsmith.stages.quantize import QuantizeOptions
from weightsmith.tools import Memory
from weightsmith.values import AWQ, GPTQ, Sources

_UNKNOWN = 3 << 30
"""For models whose dimensions are not known."""
PROBES = 8
PROBED_TOKENS = PROBES * (64 + 16)
"""Of validation's probes: at most eight of 64 tokens, and 16 after each."""
PADDED = 2
"""Tokens in the quality gate's batch per token of its texts, which are of different lengths."""
_LEFT = 256 << 20
"""What the reference answers leave in memory for a validation in the same process to start from."""
_COMPARING = 256 << 20
"""For two models' logits, and tensors that are compared element by element."""
_DEQUANTIZED = 384 << 20
"""What stays of the last dequantized matrix, and the rows that all threads dequantize."""
_PACKING = 4 << 30
"""Beside the checkpoint that a quantizer of packed checkpoints loads."""
_COPIES = 3
"""Of a layer in float32 that is calibrated: itself, as it was, and a group of its matrices."""
_SQUARES = 12
"""Float32 numbers per pair of inputs while errors are compensated: two Gram matrices, and five in
float64 (`quantizers/layerwise/compensating.py`)."""
_STREAMED = 512 << 20
"""For a few rows and the scales of one matrix."""
_GGUF = 1 << 30
_WAYS_OUT: Mapping[str, str] = {
    "reference": "set evaluate.limit to ask fewer questions",
    "validate": "set validate.enabled to false",
    "cache-scales": "set serve.kv_cache_scales to none",
    "dequantized": "set evaluate.limit to ask fewer questions",
    "quality": "set quality.gate to false, or quality.tokens to fewer",
}


def reference_memory(
    model: ModelFacts, sources: Sources, tasks: Sequence[RecipeTask], memory: Memory
) -> int:
    """Return the peak of the reference answers in bytes, whichever of them are missing."""
    try:
        return planned_bytes(asked_before_merging(sources, tasks), model.shape, memory.budget)
    except InputRefused:
        return _UNKNOWN


def asked_before_merging(sources: Sources, tasks: Sequence[RecipeTask]) -> tuple[Unit, ...]:
    """Return what base and adapters are asked; the merged model follows them."""
    return tuple(once(asked_of(subjects(sources, t.adapter), t.task) for t in tasks))


def dequantized_memory(model: ModelFacts, tasks: Sequence[RecipeTask], memory: Memory) -> int:
    """Return the peak in bytes of the dequantized weights' answers, of the largest task."""
    return max(_walk(model, walk_of(one.task), memory) for one in tasks) + _DEQUANTIZED


def validate_memory(model: ModelFacts, sources: Sources) -> int:
    """Return the peak of validation in bytes: merged model, base and adapters side by side."""
    adapters = 2 * sum(a.snapshot.tree.weight_bytes for a in sources.adapters)
    walk = Walk(views=3, rows=8, tokens=PROBED_TOKENS, adapter_bytes=adapters)
    return _single_pass(model, walk) + _COMPARING


def quality_memory(model: ModelFacts, tokens: int) -> int:
    """Return the peak of the quality gate in bytes: both models, a few rows of each matrix."""
    walk = Walk(views=2, rows=8, tokens=PADDED * tokens)
    return _single_pass(model, walk) + _DEQUANTIZED + _COMPARING


def fit_together(
    model: ModelFacts, sources: Sources, tasks: Sequence[RecipeTask], memory: Memory
) -> bool:
    """Return whether a job may use what reference answers and validation need in one process."""
    return not memory.limit or proof_memory(model, sources, tasks, memory) <= memory.limit


def proof_memory(
    model: ModelFacts, sources: Sources, tasks: Sequence[RecipeTask], memory: Memory
) -> int:
    """Return the peak in bytes of reference answers and validation in one process."""
    answers = reference_memory(model, sources, tasks, memory) if tasks else 0
    return max(answers, validate_memory(model, sources)) + _LEFT


def quantize_memory(model: ModelFacts, size: int, options: QuantizeOptions) -> int:
    """Return the peak of quantizing a checkpoint of `size` bytes, without mapped files.

    A GGUF file is written tensor by tensor, experts stacked, at most twice in float32; quantizers
    of packed checkpoints load the model, unless they stream it.
    """
    limit = quantizing.memory_limit(size, options)
    if of_format(options.format.name).streams:
        return _STREAMED
    if options.texts and of_format(options.format.name).by_layer:
        compensated = options.format in (AWQ, GPTQ)
        return min(_calibrated(model, size, options.texts, compensated=compensated), limit)
    if options.format.suffix != ".gguf":
        return min(_PACKING + size, limit)
    try:
        shape, experts = model.shape, model.matrices.experts * model.matrices.expert_width
    except InputRefused:
        return min(_UNKNOWN, limit)
    # Embeddings and heads are read a few rows at a time by every converter.
    largest = shape.hidden * max(shape.intermediate, experts)
    writing = min(_GGUF + 2 * 4 * largest, limit)
    if not of_format(options.format.name).walked(options.options):
        return writing
    # One layer in float32, and the states of as many tokens as run together, while the converter
    # starts.
    walking = _GGUF + 2 * size // max(1, model.layers) + 4 * shape.hidden * WALK_TOKENS
    return max(writing, walking + _GGUF)


def cache_scales_memory(model: ModelFacts, size: int, texts: Texts) -> int:
    """Return the peak of measuring a cache's scales in bytes, for a checkpoint of `size` bytes."""
    return _calibrated(model, size, texts, compensated=False)


def _calibrated(model: ModelFacts, size: int, texts: Texts, *, compensated: bool) -> int:
    """Return the peak in bytes of a walk over calibration text, one decoder layer at a time.

    The sum of libraries, the states of all text, the layer in float32, and one batch's activations
    or what it takes to compensate errors, if that is more.
    """
    try:
        shape, experts = model.shape, model.matrices.expert_width
    except InputRefused:
        return _UNKNOWN
    tokens = texts.letters // LETTERS + BATCH_TOKENS
    states = shape.hidden + BLOCK + 2 * shape.head_dim  # with a mask, and rotary factors
    if compensated:
        states += shape.hidden  # in front of the layer, which runs more than once
    if compensated and experts:  # their inputs are kept until the layer has run
        states += 2 * shape.hidden + 4 * experts
    batch = token_bytes(
        layers=0, cached=0, hidden=shape.hidden, intermediate=max(shape.intermediate, experts)
    )
    table = 2 * shape.vocab * shape.hidden  # of embeddings, which no layer has
    layer = 2 * max(0, size - table) // max(1, model.layers)
    widest = max(shape.hidden, shape.intermediate, experts)
    copies, squares = (_COPIES, 4 * _SQUARES * widest**2) if compensated else (1, 0)
    return START + 4 * tokens * states + copies * layer + max(BATCH_TOKENS * batch, squares)


def _walk(model: ModelFacts, walk: Walk, memory: Memory) -> int:
    try:
        return walk_bytes(model.shape, walk, memory.budget)
    except InputRefused:
        return _UNKNOWN


def _single_pass(model: ModelFacts, walk: Walk) -> int:
    try:
        return single_pass_bytes(model.shape, walk)
    except InputRefused:
        return _UNKNOWN


def require_memory(needs: Iterable[tuple[str, str, int]], memory: Memory) -> None:
    """Raise EnvironmentFailure for the stage (name, target, bytes) that needs most, if too much.

    Compares with what is allowed or free, not with the half that jobs choose to fill.
    """
    stage, target, needed = max(needs, key=lambda need: need[2], default=("", "", 0))
    if memory.limit and needed > memory.limit:
        name = f"{stage} {target}".strip()
        also = f", or {way}" if (way := _WAYS_OUT.get(stage)) else ""
        raise EnvironmentFailure(
            f"{name} needs {human(needed)} of memory, and a job may use {human(memory.limit)}",
            hint="raise --memory if it was given, close other programs, build on a machine with "
            f"more memory{also}; `plan` shows what each stage needs",
        )
