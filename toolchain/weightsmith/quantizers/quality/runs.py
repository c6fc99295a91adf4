"""Runs a checkpoint and its quantized model side by side over the same texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from weightsmith.forward.heads import logits_of
from weightsmith.forward.libraries import ModelFails, running
from weightsmith.forward.lockstep import Meeting
from weightsmith.forward.network import (
    beside_text,
    decoder_of,
    fill,
    skeleton,
    skeleton_with_weights,
)
from weightsmith.forward.views import stream
from weightsmith.forward.walk import Count, Opening, Progress, walk
from weightsmith.forward.weights import Weights
from weightsmith.models.tensors import View
from weightsmith.quantizers.quality.dequantized import Dequantized, require_complete
from weightsmith.quantizers.quality.layers import PROBE_ROWS, LayerErrors, decoder_layers
from weightsmith.quantizers.quality.result import TensorFault


@dataclass(slots=True)
class States:
    """What a model's decoder returned, and the model for its head."""

    output: Any
    model: Any

    @property
    def vocabulary(self) -> int:
        """Number of tokens."""
        return int(self.model.get_output_embeddings().weight.shape[0])

    def log_probabilities(self, places: Sequence[tuple[int, int]]) -> torch.Tensor:
        """Return [places, vocabulary] at (text, token), by the model's head and scaling."""
        rows, columns = (list(axis) for axis in zip(*places, strict=True))
        with torch.inference_mode():
            states = self.output[0][rows, columns]
            return logits_of(self.model, type(self.output), states).log_softmax(-1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Both:
    """What both models computed, and the errors of the quantized one."""

    checkpoint: States
    quantized: States
    layers: Mapping[int, float]
    """Decoder layer -> its own error."""
    errors: Mapping[str, float]
    """Tensor -> its relative error."""
    faults: Sequence[TensorFault]
    """Tensors that are damaged."""


def run_both(model: Path, view: View, ids: torch.Tensor, length: int, progress: Progress) -> Both:
    """Run token ids [texts, tokens] through both; the first text has `length` tokens.

    Raises Unmeasurable for an unsupported architecture, CheckFailed for weights that are not
    finite.
    """
    layers = len(decoder_layers(skeleton(model)))
    compared = LayerErrors(length, partial(Count(2 * layers, progress), 1))
    quantized = Quantized(model, view)
    probed = torch.cat([ids, ids[:PROBE_ROWS]])

    def run(network: Any, meeting: Meeting) -> States:
        if network is quantized.network:
            compared.compare(network, meeting)
            return _run(network, probed)
        compared.record(network)
        return _run(network, ids)

    both: dict[str, Opening] = {"checkpoint": _Checkpoint(model), "quantized": quantized}
    found = walk(both, dict.fromkeys(both, run), alike=True)
    if weights := quantized.weights:
        weights.compare_rest()
    return Both(
        **found,
        layers=compared.found,
        errors=weights.errors if weights else {},
        faults=weights.faults if weights else (),
    )


def _run(model: Any, ids: torch.Tensor) -> States:
    with torch.inference_mode(), running():
        return States(decoder_of(model)(input_ids=ids, use_cache=False), model)


@dataclass(frozen=True, slots=True)
class _Checkpoint:
    checkpoint: Path

    @property
    def source(self) -> Path:
        return self.checkpoint

    def streamed(self, meeting: Meeting, number: int) -> Any:
        model, weights = self._built()
        stream(model, weights, meeting, number)
        decoder_of(model).register_forward_hook(_require_finite)
        return model

    def whole(self) -> Any:
        model, weights = self._built()
        fill(model, weights)
        return model

    def _built(self) -> tuple[Any, Weights]:
        model, weights = skeleton_with_weights(self.checkpoint)
        require_complete(model, weights)
        return model, weights


@dataclass(slots=True)
class Quantized:
    """A quantized model with its checkpoint's network, to be opened by `walk`."""

    checkpoint: Path
    view: View
    network: Any = None
    weights: Dequantized | None = None

    @property
    def source(self) -> str:
        """Its own matrices."""
        return "quantized"

    def streamed(self, meeting: Meeting, number: int) -> Any:
        """Return it with its weights dequantized when they are used."""
        model, weights = self._built()
        stream(model, weights, meeting, number, beside_text(model))
        return model

    def whole(self) -> Any:
        """Return it with its weights dequantized in memory."""
        model, weights = self._built()
        fill(model, weights, beside_text(model))
        return model

    def _built(self) -> tuple[Any, Weights]:
        self.network, _ = skeleton_with_weights(self.checkpoint)
        self.weights = Dequantized(self.checkpoint, self.network, self.view)
        return self.network, self.weights


def _require_finite(_: Any, __: Any, output: Any) -> None:
    """Raise ModelFails if the states are not finite: a weight was used without its module."""
    if not bool(torch.isfinite(output[0]).all()):
        raise ModelFails("the hidden states are not finite")
