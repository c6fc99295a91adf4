"""Compare a quantized model with its 16-bit checkpoint on held-out text, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from weightsmith.core.cpus import all_but_one
from weightsmith.core.errors import InputRefused
from weightsmith.core.values import JsonValue
from weightsmith.forward.walk import Progress
from weightsmith.models.tensors import View
from weightsmith.quantizers.quality.result import LayerError, Loss, TensorError, short
from weightsmith.quantizers.quality.runs import run_both
from weightsmith.quantizers.quality.texts import Reading, readings

_Key = TypeVar("_Key", int, str)
_LONGEST = 256
"""Maximum tokens of a sequence."""
_MIN_TOKENS = 64
_NAMED = 3
"""Worst layers and tensors to report."""
_LOGIT_BYTES = 128 << 20
"""Memory for the logits of both models and their comparison."""
_TIE = 0.1
"""Nats within which two next tokens count as tied: rounding decides between them without a loss.
A weak model has many such ties."""
_RESAMPLES = 1000
_TAIL = 0.025
"""Of a two-sided 95 % interval."""
_FEWEST = 4
"""Texts below which resampling says nothing."""


def measure(
    model: Path,
    view: View,
    texts: Sequence[Mapping[str, JsonValue]],
    tokens: int,
    progress: Progress,
) -> Loss:
    """Compare `view` with the checkpoint in `model`, in float32, on held-out texts.

    Both run side by side, with one matrix of each in memory. Raises Unmeasurable for an
    unsupported architecture, InputRefused for too little text, CheckFailed for weights that are
    not finite.
    """
    torch.set_num_threads(all_but_one())
    chosen = _chosen(readings(model, texts), tokens)
    # One batch, [texts, longest], padded on the right (ignored: causal).
    longest = max(len(text.ids) for text in chosen)
    ids = torch.tensor([[*text.ids, *[0] * (longest - len(text.ids))] for text in chosen])
    found = run_both(model, view, ids, [len(text.ids) for text in chosen], progress)
    layers, errors = found.layers, found.errors
    places = [
        (row, column)
        for row, text in enumerate(chosen)
        for column in range(text.answer - 1, len(text.ids) - 1)
    ]
    # As many positions at a time as fit.
    totals, step = Totals(), max(1, _LOGIT_BYTES // (16 * found.checkpoint.vocabulary))
    for start in range(0, len(places), step):
        part = places[start : start + step]
        following = torch.tensor([chosen[row].ids[column + 1] for row, column in part])
        right = found.checkpoint.log_probabilities(part)
        other = found.quantized.log_probabilities(part)
        totals.add(right, other, following, torch.tensor([row for row, _ in part]))
    return Loss(
        **totals.result(),
        texts=len(chosen),
        tokens=sum(len(text.ids) for text in chosen),
        layer_error=short(max(layers.values())),
        worst_layers=tuple(LayerError(layer=n, error=short(layers[n])) for n in _worst(layers)),
        worst_tensors=tuple(TensorError(tensor=n, error=short(errors[n])) for n in _worst(errors)),
        damaged=tuple(sorted(found.faults, key=lambda one: -one.error / one.limit)[:_NAMED]),
    )


def _worst(errors: Mapping[_Key, float]) -> list[_Key]:
    """Return the keys of the largest errors; equal ones in order."""
    return sorted(errors, key=lambda one: (-errors[one], one))[:_NAMED]


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


@dataclass(slots=True)
class Totals:
    """Both models' differences at each predicted token, and the text that it is from."""

    texts: list[torch.Tensor] = field(default_factory=list)
    divergences: list[torch.Tensor] = field(default_factory=list)
    agreements: list[torch.Tensor] = field(default_factory=list)
    before: list[torch.Tensor] = field(default_factory=list)
    after: list[torch.Tensor] = field(default_factory=list)

    def add(
        self, right: torch.Tensor, other: torch.Tensor, following: torch.Tensor, texts: torch.Tensor
    ) -> None:
        """Add both models' log probabilities [positions, vocabulary].

        `following` has the actual next tokens, `texts` the number of each position's text.
        """
        self.texts.append(texts)
        self.divergences.append((right.exp() * (right - other)).sum(-1).clamp(min=0))
        picked = right.gather(1, other.argmax(-1, keepdim=True))[:, 0]
        self.agreements.append((right.amax(-1) - picked <= _TIE).float())
        self.before.append(-right.gather(1, following[:, None])[:, 0])
        self.after.append(-other.gather(1, following[:, None])[:, 0])

    def result(self) -> dict[str, Any]:
        """Return means and quantiles over all tokens, and `intervals` of those that are judged."""
        divergence = torch.cat(self.divergences)
        agree, before, after = map(torch.cat, (self.agreements, self.before, self.after))
        return {
            "kl_mean": short(float(divergence.mean())),
            "kl_p99": short(float(divergence.quantile(0.99))),
            "top1": short(float(agree.mean())),
            "perplexity": short(_exp(float(after.mean()))),
            "perplexity_reference": short(_exp(float(before.mean()))),
            "perplexity_ratio": short(_exp(float((after - before).mean()))),
            "intervals": _intervals(torch.cat(self.texts), divergence, agree, after - before),
        }


def _intervals(
    texts: torch.Tensor, divergence: torch.Tensor, agree: torch.Tensor, lost: torch.Tensor
) -> Mapping[str, tuple[float, float]]:
    """Return 95 % percentile intervals, from resamples of whole texts with a fixed seed.

    Tokens of one text are not independent, texts are. Efron, "Bootstrap methods: another look at
    the jackknife", 1979. Returns {} for fewer than four texts.
    """
    names, place = torch.unique(texts, return_inverse=True)
    if len(names) < _FEWEST:
        return {}
    chance = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(names), (_RESAMPLES, len(names)), generator=chance)
    counts = torch.zeros(_RESAMPLES, len(names)).scatter_add_(1, drawn, torch.ones(drawn.shape))
    weights = counts[:, place]
    total = weights.sum(1)
    order = divergence.argsort()
    reached = weights[:, order].cumsum(1) >= 0.99 * total[:, None]
    found = {
        "kl_mean": weights @ divergence / total,
        "kl_p99": divergence[order][reached.int().argmax(1)],
        "top1": weights @ agree / total,
        "perplexity_ratio": (weights @ lost / total).clamp(max=700).exp(),
    }
    ends = torch.tensor([_TAIL, 1 - _TAIL])
    return {
        name: (short(float(low)), short(float(high)))
        for name, values in found.items()
        for low, high in [values.double().quantile(ends.double())]
    }


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0))
