"""Runs a checkpoint and its quantized model side by side over the same texts.

Each layer's own error, on the correct input, is measured beside the divergence of the logits: a
memorised answer survives shuffled scales, the layer's output does not (0.35 instead of 0.06 on
`examples/tiny`). Padding is not counted: with it, one layer of the support bot's GPTQ had 0.48
instead of 0.20. `llama-perplexity --kl-divergence` knows one family of formats and no layers;
perplexity alone fell at four bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from weightsmith.core.errors import Unmeasurable
from weightsmith.forward.heads import logits_of
from weightsmith.forward.libraries import ModelFails, running
from weightsmith.forward.lockstep import Lockstep
from weightsmith.forward.network import (
    decoder_of,
    fill,
    lacking,
    modules_without_text,
    skeleton,
    skeleton_with_weights,
)
from weightsmith.forward.views import stream
from weightsmith.forward.walk import Count, Opening, Progress, walk
from weightsmith.forward.weights import Weights
from weightsmith.models.tensors import View
from weightsmith.quantizers.quality.dequantized import Dequantized
from weightsmith.quantizers.quality.result import TensorFault

if TYPE_CHECKING:
    from weightsmith.forward.kinds import Model


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
    quantized = QuantizedNetwork(model, view)
    probed = torch.cat([ids, ids[:PROBE_ROWS]])

    def run(network: Model, lockstep: Lockstep) -> States:
        if network is quantized.network:
            compared.compare(network, lockstep)
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


def _run(model: Model, ids: torch.Tensor) -> States:
    with torch.inference_mode(), running():
        return States(decoder_of(model)(input_ids=ids, use_cache=False), model)


@dataclass(frozen=True, slots=True)
class _Checkpoint:
    checkpoint: Path

    @property
    def source(self) -> Path:
        return self.checkpoint

    def streamed(self, lockstep: Lockstep, number: int) -> Model:
        model, weights = self._built()
        stream(model, weights, lockstep, number)
        decoder_of(model).register_forward_hook(_require_finite)
        return model

    def whole(self) -> Model:
        model, weights = self._built()
        fill(model, weights)
        return model

    def _built(self) -> tuple[Model, Weights]:
        model, weights = skeleton_with_weights(self.checkpoint)
        if names := lacking(model, weights):
            raise Unmeasurable(
                f"the checkpoint has no tensor {names[0]}, which its architecture needs",
                hint="use the task score instead",
            )
        return model, weights


@dataclass(slots=True)
class QuantizedNetwork:
    """A quantized model with its checkpoint's network, to be opened by `walk`."""

    checkpoint: Path
    view: View
    network: Any = None
    weights: Dequantized | None = None

    @property
    def source(self) -> str:
        """Its own matrices."""
        return "quantized"

    def streamed(self, lockstep: Lockstep, number: int) -> Model:
        """Return it with its weights dequantized when they are used."""
        model, weights = self._built()
        stream(model, weights, lockstep, number, modules_without_text(model))
        return model

    def whole(self) -> Model:
        """Return it with its weights dequantized in memory."""
        model, weights = self._built()
        fill(model, weights, modules_without_text(model))
        return model

    def _built(self) -> tuple[Model, Weights]:
        self.network, _ = skeleton_with_weights(self.checkpoint)
        self.weights = Dequantized(self.checkpoint, self.network, self.view)
        return self.network, self.weights


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


def _require_finite(_: torch.nn.Module, __: object, output: Sequence[torch.Tensor]) -> None:
    """Raise ModelFails if the states are not finite: a weight was used without its module."""
    if not bool(torch.isfinite(output[0]).all()):
        raise ModelFails("the hidden states are not finite")


PROBE_ROWS = 1
"""First sequences on which each layer's own error is measured."""


def decoder_layers(model: Model) -> list[torch.nn.Module]:
    """Return the decoder's layers; raise Unmeasurable if there is not exactly one list of them."""
    lists = [m for m in decoder_of(model).children() if isinstance(m, torch.nn.ModuleList)]
    if len(lists) != 1:
        raise Unmeasurable(
            f"{type(model).__name__} has no single list of decoder layers to measure",
            hint="use the task score instead",
        )
    return list(lists[0])


@dataclass(slots=True)
class LayerErrors:
    """Compares the layers of two models that run at the same time.

    The quantized model's batch ends with copies of its first sequences. In front of each layer,
    their states are replaced by the checkpoint's.
    """

    length: int
    """Tokens of the probe without padding, where errors do not matter but can be three times as
    large."""
    advance: Callable[[], None]
    inputs: dict[int, torch.Tensor] = field(default_factory=dict)
    outputs: dict[int, torch.Tensor] = field(default_factory=dict)
    found: dict[int, float] = field(default_factory=dict)
    """Layer -> its error, relative to what it adds to its input."""

    def record(self, model: Model) -> None:
        """Record inputs and outputs of the checkpoint's layers."""
        for number, layer in enumerate(decoder_layers(model)):
            _hook(layer, partial(self._note_input, number), partial(self._note_output, number))

    def compare(self, model: Model, lockstep: Lockstep) -> None:
        """Judge the quantized model's layers, each when the checkpoint has run it."""
        for number, layer in enumerate(decoder_layers(model)):
            judge = partial(self._judge, number, lockstep)
            _hook(layer, partial(self._replace, number, lockstep), judge)

    def _note_input(self, number: int, states: torch.Tensor) -> torch.Tensor:
        self.inputs[number] = states[:PROBE_ROWS].clone()
        return states

    def _note_output(self, number: int, states: torch.Tensor) -> None:
        self.outputs[number] = states[:PROBE_ROWS].clone()
        self.advance()

    def _replace(self, number: int, lockstep: Lockstep, states: torch.Tensor) -> torch.Tensor:
        lockstep.wait_until(lambda: number in self.inputs)
        return torch.cat([states[:-PROBE_ROWS], self.inputs[number]])

    def _judge(self, number: int, lockstep: Lockstep, states: torch.Tensor) -> None:
        lockstep.wait_until(lambda: number in self.outputs)
        before, right = self.inputs.pop(number), self.outputs.pop(number)
        before, right = before[:, : self.length], right[:, : self.length]
        change = float((right - before).norm()) or 1.0
        found = states[-PROBE_ROWS:, : self.length]
        self.found[number] = float((found - right).norm()) / change
        self.advance()


def _hook(
    layer: torch.nn.Module,
    started: Callable[[torch.Tensor], torch.Tensor],
    ended: Callable[[torch.Tensor], None],
) -> None:
    def before(
        _: torch.nn.Module, args: tuple[torch.Tensor, ...], named: dict[str, torch.Tensor]
    ) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
        if args:
            return (started(args[0]), *args[1:]), named
        return args, {**named, "hidden_states": started(named["hidden_states"])}

    def after(
        _: torch.nn.Module, __: object, output: torch.Tensor | tuple[torch.Tensor, ...]
    ) -> None:
        ended(output[0] if isinstance(output, tuple) else output)

    layer.register_forward_pre_hook(before, with_kwargs=True)
    layer.register_forward_hook(after)
