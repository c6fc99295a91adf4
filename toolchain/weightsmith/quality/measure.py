"""Compare a quantized model with its 16-bit checkpoint on held-out text, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from weightsmith.checkpoints.tensors import CheckpointTensors, View
from weightsmith.cpus import all_but_one
from weightsmith.errors import CheckFailed, InputRefused
from weightsmith.quality.result import LayerError, Loss, TensorError
from weightsmith.quality.streamed import StreamedModel
from weightsmith.quality.texts import Reading, readings
from weightsmith.values import Json

Progress = Callable[[int, int], None]

_LONGEST = 256
"""Maximum tokens of a sequence."""
_MIN_TOKENS = 64
_PROBE_ROWS = 1
"""First sequences on which each layer's own error is measured, with the checkpoint's input."""
_TIE = 0.1
"""Nats within which two next tokens count as tied: rounding decides between them without a loss.
A weak model has many such ties."""
_NAMED = 3
"""Worst layers and tensors to report."""


def measure(
    model: Path,
    view: View,
    texts: Sequence[Mapping[str, Json]],
    tokens: int,
    progress: Progress,
) -> Loss:
    """Compare `view` with the checkpoint in `model`, in float32, on held-out texts.

    Raises Unmeasurable for an unsupported architecture, InputRefused for too little text,
    CheckFailed for weights that are not finite.
    """
    torch.set_num_threads(all_but_one())
    chosen = _chosen(readings(model, texts), tokens)
    ids = _padded(chosen)
    network, checkpoint = StreamedModel(model), CheckpointTensors(model)
    steps = 2 * len(network.layers) + 1
    recorder = _Recorder(lambda done: progress(done, steps), length=len(chosen[0].ids))
    right = network.hidden(
        ids, recorder.plain(checkpoint), recorder.record_input, recorder.record_output
    )
    # Compute the checkpoint's log probabilities now, before its head is replaced.
    spans = [slice(text.answer - 1, len(text.ids) - 1) for text in chosen]
    reference = [
        _log_probabilities(network, row[span]) for row, span in zip(right, spans, strict=True)
    ]
    probed = torch.cat([ids, ids[:_PROBE_ROWS]])
    wrong = network.hidden(
        probed, recorder.compared(checkpoint, view), recorder.replace, recorder.judge
    )
    found = _Totals()
    for number, span in enumerate(spans):
        following = ids[number, span.start + 1 : span.stop + 1]
        found.add(reference[number], _log_probabilities(network, wrong[number, span]), following)
        reference[number] = torch.empty(0)
    progress(steps, steps)
    return Loss(
        **found.result(),
        texts=len(chosen),
        tokens=sum(len(text.ids) for text in chosen),
        layer_error=_short(max(recorder.layers.values())),
        worst_layers=recorder.worst_layers(),
        worst_tensors=recorder.worst_tensors(),
    )


def _log_probabilities(network: StreamedModel, states: torch.Tensor) -> torch.Tensor:
    """Return the log probabilities [positions, vocabulary] of last hidden states."""
    return network.logits(states[None])[0].log_softmax(-1)


def _chosen(found: Sequence[Reading], tokens: int) -> list[Reading]:
    """Return the first texts, truncated, with `tokens` tokens in total."""
    chosen: list[Reading] = []
    left = tokens
    for text in found:
        cut = Reading(ids=text.ids[: min(_LONGEST, left)], answer=text.answer)
        if len(cut.ids) > cut.answer:
            chosen.append(cut)
            left -= len(cut.ids)
        if left <= 0:
            break
    if tokens - left < _MIN_TOKENS:
        raise InputRefused(
            f"the held-out text has {tokens - left} tokens, the quality gate needs {_MIN_TOKENS}",
            hint="add calibration text, or hold out a larger share (calibration.held_out)",
        )
    return chosen


def _padded(chosen: Sequence[Reading]) -> torch.Tensor:
    """Return the texts as one batch, [texts, longest], padded on the right (ignored: causal)."""
    longest = max(len(text.ids) for text in chosen)
    return torch.tensor([[*text.ids, *[0] * (longest - len(text.ids))] for text in chosen])


@dataclass(slots=True)
class _Recorder:
    """Inputs and outputs of the checkpoint's layers, and the errors of the view's."""

    progress: Callable[[int], None]
    length: int
    """Tokens of the probe without padding, where errors do not matter but can be three times as
    large."""
    inputs: list[torch.Tensor] = field(default_factory=list)
    outputs: list[torch.Tensor] = field(default_factory=list)
    layers: dict[int, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)

    def plain(self, checkpoint: View) -> Callable[[str], torch.Tensor]:
        """Return a function for the checkpoint's weights."""
        return lambda name: _tensor(checkpoint, name)

    def compared(self, checkpoint: View, view: View) -> Callable[[str], torch.Tensor]:
        """Return a function for the view's weights that records their errors."""

        def weights(name: str) -> torch.Tensor:
            if name not in view.names:
                # Do not fall back to the checkpoint's weights.
                raise KeyError(name)
            tensor, right = _tensor(view, name), _tensor(checkpoint, name)
            if tensor.shape != right.shape:
                raise CheckFailed(
                    f"{name} has shape {list(tensor.shape)}, but {list(right.shape)} in the "
                    "checkpoint",
                    hint="the quantizer wrote another model; quantize again",
                )
            error, size = float((tensor - right).norm()), float(right.norm())
            if not math.isfinite(error):
                raise CheckFailed(
                    f"{name} has NaN or infinite values",
                    hint="check the merged weights for outliers, or choose a larger format",
                )
            self.errors[name] = error / size if size else error
            return tensor

        return weights

    def record_input(self, _: int, states: torch.Tensor) -> torch.Tensor:
        """Record the input of a layer of the checkpoint."""
        self.inputs.append(states[:_PROBE_ROWS].clone())
        return states

    def record_output(self, number: int, states: torch.Tensor) -> None:
        """Record the output of a layer of the checkpoint."""
        self.outputs.append(states[:_PROBE_ROWS].clone())
        self.progress(number + 1)

    def replace(self, number: int, states: torch.Tensor) -> torch.Tensor:
        """Replace the probe by the checkpoint's input, to exclude errors of earlier layers."""
        return torch.cat([states[:-_PROBE_ROWS], self.inputs[number]])

    def judge(self, number: int, states: torch.Tensor) -> None:
        """Record a layer's own error, relative to what the layer adds to its input."""
        right = self.outputs[number][:, : self.length]
        change = float((right - self.inputs[number][:, : self.length]).norm()) or 1.0
        found = states[-_PROBE_ROWS:, : self.length]
        self.layers[number] = float((found - right).norm()) / change
        self.progress(len(self.outputs) + number + 1)

    def worst_layers(self) -> tuple[LayerError, ...]:
        """Return the layers with the largest own error."""
        worst = sorted(self.layers, key=lambda number: -self.layers[number])[:_NAMED]
        return tuple(LayerError(layer=n, error=_short(self.layers[n])) for n in worst)

    def worst_tensors(self) -> tuple[TensorError, ...]:
        """Return the tensors with the largest relative error."""
        worst = sorted(self.errors, key=lambda name: -self.errors[name])[:_NAMED]
        return tuple(TensorError(tensor=n, error=_short(self.errors[n])) for n in worst)


def _tensor(view: View, name: str) -> torch.Tensor:
    if name not in view.names:
        raise KeyError(name)
    data = view.tensor(name)
    return torch.from_numpy(data if data.flags.writeable else data.copy())


@dataclass(slots=True)
class _Totals:
    """Totals over all tokens."""

    divergences: list[torch.Tensor] = field(default_factory=list)
    agree: int = 0
    surprise: tuple[float, float] = (0.0, 0.0)
    predicted: int = 0

    def add(self, right: torch.Tensor, other: torch.Tensor, following: torch.Tensor) -> None:
        """Add both models' log probabilities [positions, vocabulary] and the actual next tokens."""
        self.divergences.append((right.exp() * (right - other)).sum(-1).clamp(min=0))
        picked = right.gather(1, other.argmax(-1, keepdim=True))[:, 0]
        self.agree += int((right.amax(-1) - picked <= _TIE).sum())
        self.surprise = (
            self.surprise[0] - float(right.gather(1, following[:, None]).sum()),
            self.surprise[1] - float(other.gather(1, following[:, None]).sum()),
        )
        self.predicted += len(following)

    def result(self) -> dict[str, float]:
        """Return means and quantiles."""
        divergence = torch.cat(self.divergences)
        before, after = (total / self.predicted for total in self.surprise)
        return {
            "kl_mean": _short(float(divergence.mean())),
            "kl_p99": _short(float(divergence.quantile(0.99))),
            "top1": _short(self.agree / len(divergence)),
            "perplexity": _short(math.exp(min(after, 700.0))),
            "perplexity_reference": _short(math.exp(min(before, 700.0))),
            "perplexity_ratio": _short(math.exp(min(after - before, 700.0))),
        }


def _short(value: float) -> float:
    """Round to six digits, more than two machines agree on."""
    return float(f"{value:.6g}")
