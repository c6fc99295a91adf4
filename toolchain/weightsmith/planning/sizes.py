"""Sizes on disk of what does not exist yet."""

from __future__ import annotations

from weightsmith.checkpoints.facts import ModelFacts
from weightsmith.quantizers import of_format
from weightsmith.stages.quantize import kept_bytes
from weightsmith.values import Format


def estimated_bytes(checkpoint_bytes: int, format_: Format, model: ModelFacts | None = None) -> int:
    """Return the artifact's size before it exists, from nominal bits.

    The checkpoint has 16 where its config.json does not say that it has 32. Packed checkpoints
    keep the embeddings, and an output layer of its own, in 16 bits.
    """
    if not format_.packed:
        return checkpoint_bytes
    if model and model.stated_dtype == "float32":
        checkpoint_bytes //= 2
    kept = kept_bytes(checkpoint_bytes, format_, model)
    return kept + int((checkpoint_bytes - kept) * format_.bits_per_weight / 16)


def disk_peak(checkpoint_bytes: int, format_: Format, model: ModelFacts) -> int:
    """Return the bytes on disk at the worst moment of making and keeping an artifact."""
    if not format_.packed:
        return checkpoint_bytes
    kept = kept_bytes(checkpoint_bytes, format_, model)
    return of_format(format_.name).peak_disk(checkpoint_bytes, kept, format_)
