"""Scales of an 8-bit KV cache: the largest keys and values over calibration text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from weightsmith.core.cpus import all_but_one
from weightsmith.core.errors import InputRefused
from weightsmith.forward.layers import Layers
from weightsmith.forward.libraries import load_tokenizer
from weightsmith.quantizers.running import encoder, samples

Progress = Callable[[int, int], object]

_LARGEST = 448.0
"""Of float8_e4m3fn."""
_KEYS = (".k_proj.weight", ".qkv_proj.weight")
"""Ends of the tensors that make keys; what stands before is the attention's name."""


def cache_scales(
    model: Path, lines: Sequence[str], progress: Progress = lambda *_: None
) -> Mapping[str, tuple[float, float]]:
    """Return what keys and values are divided by, by the attention's name in the checkpoint.

    A scale is the largest magnitude that the cache would get, keys after their rotation, divided by
    448, the largest float8_e4m3fn. One decoder layer at a time is in memory. Raises InputRefused
    for too little text, for a checkpoint that lacks a tensor, for values that are not finite, and
    for layers that put no keys and values into a cache.
    """
    torch.set_num_threads(all_but_one())
    layers = Layers(model, samples(list(lines), encoder(load_tokenizer(model))))
    found: dict[str, tuple[float, float]] = {}
    for number, path in enumerate(layers.paths):
        with layers.loaded(number) as layer:
            largest = _Largest()
            for batch, one in enumerate(layers.batches):
                largest.valid = one.valid
                layers.states[batch] = layers.run(number, batch, cache=largest)
            layers.require_finite(number, layers.states)
            name = _attention(layers, path, layer)
        if not largest.seen or not name:
            raise InputRefused(
                f"{path} puts no keys and values into a cache that can be measured",
                hint="set serve.kv_cache_scales to none",
            )
        found[name] = (_scale(largest.keys), _scale(largest.values))
        progress(number + 1, len(layers.paths))
    return found


class _Largest:
    """Stands for the cache of a layer, and keeps the largest magnitudes that it gets."""

    def __init__(self) -> None:
        self.valid = torch.empty(0)
        self.keys = self.values = 0.0
        self.seen = False

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take keys and values [texts, heads, longest, width]; return them unchanged."""
        self.seen = True
        self.keys = max(self.keys, self._largest(keys))
        self.values = max(self.values, self._largest(values))
        return keys, values

    def _largest(self, states: torch.Tensor) -> float:
        rows = states.transpose(1, 2).reshape(len(self.valid), -1)
        return float(rows[self.valid].abs().max())


def _attention(layers: Layers, path: str, layer: nn.Module) -> str:
    """Return the attention's name in the checkpoint; "" if no matrix makes keys."""
    for name, module in layer.named_modules():
        weight = f".{name}.weight"
        if isinstance(module, nn.Linear) and weight.endswith(_KEYS):
            tensor = layers.weights.tensor_of(f"{path}{weight}")
            return tensor.removesuffix(".weight").rpartition(".")[0]
    return ""


def _scale(largest: float) -> float:
    """Return a float32; keys of zeros take any scale."""
    return float(torch.tensor(largest) / _LARGEST) or 1.0
