"""A quantized model as a subject that is asked questions: its weights, in float32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from weightsmith.quantizers.quality.runs import QuantizedNetwork


@dataclass(slots=True)
class QuantizedSubject(QuantizedNetwork):
    """What `merging.reference.Subject` says of a checkpoint, of its quantized weights."""

    adapters: Sequence[tuple[Path, float]] = ()
    speakers: Sequence[Path] = ()
    draft: str = ""
    draft_texts: Sequence[str] = ()

    @property
    def model(self) -> Path:
        """The checkpoint, whose tokenizer and chat template word the questions."""
        return self.checkpoint
