"""Estimates sizes on disk before the files exist."""

from __future__ import annotations

from collections.abc import Mapping

from weightsmith.core.values import Format, JsonValue
from weightsmith.models.facts import ModelFacts
from weightsmith.quantizers import of_format
from weightsmith.quantizers.architectures import has_projector
from weightsmith.serving.projector import Projector
from weightsmith.serving.targets import Target


def estimated_bytes(checkpoint_bytes: int, format_: Format, model: ModelFacts | None = None) -> int:
    """Return the estimated size of an artifact in bytes, from nominal bits per weight.

    The checkpoint has 16 bits per weight unless its config.json says 32. Packed checkpoints keep
    the embeddings, and a separate output layer, in 16 bits.
    """
    if not format_.packed:
        return checkpoint_bytes
    if model and model.stated_dtype == "float32":
        checkpoint_bytes //= 2
    kept = kept_bytes(checkpoint_bytes, format_, model)
    return kept + int((checkpoint_bytes - kept) * format_.bits_per_weight / 16)


def expected_projector(target: Target, model: ModelFacts) -> Projector | None:
    """Return the projector that a target's GGUF file will have beside it, and its size, about."""
    size = projector_bytes(model) if "gguf" in target.engine.accepts else 0
    return Projector(size=size) if size else None


def disk_peak(
    checkpoint_bytes: int, format_: Format, model: ModelFacts, options: Mapping[str, JsonValue]
) -> int:
    """Return the peak disk usage, in bytes, of making and storing an artifact."""
    if not format_.packed:
        return checkpoint_bytes
    kept = kept_bytes(checkpoint_bytes, format_, model)
    return of_format(format_.name).peak_disk(checkpoint_bytes, kept, format_, options)


def kept_bytes(checkpoint_bytes: int, format_: Format, model: ModelFacts | None) -> int:
    """Return the bytes that stay in 16 bits in a packed checkpoint: embeddings, head and tower.

    Beside a GGUF file, that is the projector.
    """
    if model is None:
        return 0
    if format_.suffix == ".gguf":
        return min(checkpoint_bytes, projector_bytes(model))
    tables = 1 if model.tied_embeddings else 2
    weights = tables * model.shape.vocab * model.shape.hidden + model.matrices.vision.weights
    return min(checkpoint_bytes, 2 * weights)


def projector_bytes(model: ModelFacts) -> int:
    """Return about how large a model's projector for llama.cpp is; 0 if it has none."""
    return max(1, 2 * model.matrices.vision.weights) if has_projector(model) else 0
