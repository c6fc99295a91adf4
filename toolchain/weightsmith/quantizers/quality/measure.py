"""Compare a quantized model with its 16-bit checkpoint on held-out text, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from weightsmith.core.cpus import all_but_one
from weightsmith.core.errors import InputRefused
from weightsmith.core.values import JsonValue
from weightsmith.forward.walk import Progress
from weightsmith.models.tensors import View
from weightsmith.quantizers.quality.result import LayerError, Loss, TensorError
from weightsmith.quantizers.quality.runs import States, run_both
from weightsmith.quantizers.quality.texts import Reading, readings
from weightsmith.quantizers.quality.totals import Totals, short

_LONGEST = 256
"""Maximum tokens of a sequence."""
_MIN_TOKENS = 64
_NAMED = 3
"""Worst layers and tensors to report."""
_LOGIT_BYTES = 128 << 20
"""Memory for the logits of both models and their comparison."""


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
    found = run_both(model, view, _padded(chosen), len(chosen[0].ids), progress)
    totals = _compared(chosen, found.checkpoint, found.quantized)
    layers, errors = found.layers, found.errors
    return Loss(
        **totals.result(),
        texts=len(chosen),
        tokens=sum(len(text.ids) for text in chosen),
        layer_error=short(max(layers.values())),
        worst_layers=tuple(LayerError(layer=n, error=short(layers[n])) for n in _worst(layers)),
        worst_tensors=tuple(TensorError(tensor=n, error=short(errors[n])) for n in _worst(errors)),
        damaged=tuple(sorted(found.faults, key=lambda one: -one.error / one.limit)[:_NAMED]),
    )


def _worst(errors: Mapping[Any, float]) -> list[Any]:
    """Return the keys of the largest errors; equal ones in order."""
    return sorted(errors, key=lambda one: (-errors[one], one))[:_NAMED]


def _compared(chosen: Sequence[Reading], right: States, other: States) -> Totals:
    """Compare the next-token probabilities of both, as many positions at a time as fit."""
    places = [
        (row, column)
        for row, text in enumerate(chosen)
        for column in range(text.answer - 1, len(text.ids) - 1)
    ]
    found, step = Totals(), max(1, _LOGIT_BYTES // (16 * right.vocabulary))
    for start in range(0, len(places), step):
        part = places[start : start + step]
        following = torch.tensor([chosen[row].ids[column + 1] for row, column in part])
        texts = torch.tensor([row for row, _ in part])
        both = (right.log_probabilities(part), other.log_probabilities(part))
        found.add(*both, following, texts)
    return found


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
