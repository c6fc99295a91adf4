"""Estimates sizes on disk before the files exist."""

from __future__ import annotations

from collections.abc import Mapping

from weightsmith.checkpoints.facts import ModelFacts
from weightsmith.quantizers import of_format
from weightsmith.serving.projector import Projector
from weightsmith.serving.targets import Target
from weightsmith.stages.quantize import kept_bytes, projector_bytes
from weightsmith.values import Format, Json


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
    checkpoint_bytes: int, format_: Format, model: ModelFacts, options: Mapping[str, Json]
) -> int:
    """Return the peak disk usage, in bytes, of making and storing an artifact."""
    if not format_.packed:
        return checkpoint_bytes
    kept = kept_bytes(checkpoint_bytes, format_, model)
    return of_format(format_.name).peak_disk(checkpoint_bytes, kept, format_, options)
