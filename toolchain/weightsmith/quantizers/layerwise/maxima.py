"""The largest inputs of matrices, and keys and values of an 8-bit cache, over calibration text.

One decoder layer at a time is in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import nn

from weightsmith.core.cpus import all_but_one
from weightsmith.core.errors import InputRefused
from weightsmith.forward.layers import Layers
from weightsmith.forward.libraries import load_tokenizer
from weightsmith.forward.threads import product
from weightsmith.quantizers.layerwise.observing import Experts, Routed, is_experts
from weightsmith.quantizers.matrices import Matrix
from weightsmith.quantizers.running import samples

Progress = Callable[[int, int], object]

_LARGEST = 448.0
"""Of float8_e4m3fn."""
_KEYS = (".k_proj.weight", ".qkv_proj.weight")
"""Ends of the tensors that make keys; what stands before is the attention's name."""


def input_maxima(model: Path, lines: Sequence[str], found: Sequence[Matrix]) -> Mapping[str, float]:
    """Return the largest magnitude of each matrix's inputs, by the matrix's module.

    The experts of a layer have the same: what one of them did not see, another did. Raises
    InputRefused for too little text, text that the model cannot read, and if the checkpoint lacks a
    tensor.
    """
    torch.set_num_threads(all_but_one())
    layers = Layers(model, samples(lines, load_tokenizer(model)))
    own = {matrix.tensor: matrix.module for matrix in found if ".experts." not in matrix.module}
    most: dict[str, float] = {}
    for number, path in enumerate(layers.paths):
        stored = f"{layers.stored_path(number)}."
        inside = [m.module for m in found if m.module.startswith(stored)]
        maxima = _Maxima([name for name in inside if ".experts." in name], most)
        with layers.loaded(number) as layer:
            hooks = []
            for name, module in layer.named_modules():
                tensor = layers.weights.tensor_of(f"{path}.{name}.weight")
                if tensor in own:
                    hook = partial(maxima.linear, own[tensor])
                    hooks.append(module.register_forward_pre_hook(hook))
                elif is_experts(module):
                    hooks.append(module.register_forward_pre_hook(maxima.routed))
            states = []
            for batch, one in enumerate(layers.batches):
                maxima.valid = one.valid
                states.append(layers.run(number, batch))
            layers.require_finite(number, states)
            layers.states = states
            for handle in hooks:
                handle.remove()
    return most


@dataclass(slots=True)
class _Maxima:
    experts: Sequence[str]
    most: dict[str, float]
    valid: torch.Tensor = field(default_factory=lambda: torch.empty(0))

    def linear(self, name: str, _: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        self._see([name], args[0])

    def _see(self, names: Sequence[str], values: torch.Tensor) -> None:
        seen = float(values.reshape(len(self.valid), -1)[self.valid].abs().max())
        for name in names:
            self.most[name] = max(self.most.get(name, 0.0), seen)

    def routed(self, module: Experts, args: tuple[torch.Tensor, ...]) -> None:
        last = [name for name in self.experts if name.endswith(("down_proj", ".w2"))]
        self._see([name for name in self.experts if name not in last], args[0])
        rows, chosen = (value.reshape(len(self.valid), -1)[self.valid] for value in args[:2])
        routed = Routed(module, "", [rows], [chosen])
        for expert in range(len(module.down_proj)):
            routed_rows, count = routed.inputs(expert, 0)
            if count:
                gate, up = product(routed_rows, module.gate_up_proj[expert]).chunk(2, 1)
                inner = float((module.act_fn(gate) * up).abs().max())
                self.most |= {name: max(self.most.get(name, 0.0), inner) for name in last}


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
    layers = Layers(model, samples(lines, load_tokenizer(model)))
    found: dict[str, tuple[float, float]] = {}
    for number, path in enumerate(layers.paths):
        attention, largest = "", _Largest()
        with layers.loaded(number) as layer:
            for batch, one in enumerate(layers.batches):
                largest.valid = one.valid
                layers.states[batch] = layers.run(number, batch, cache=largest)
            layers.require_finite(number, layers.states)
            for name, module in layer.named_modules():
                weight = f".{name}.weight"
                if isinstance(module, nn.Linear) and weight.endswith(_KEYS):
                    tensor = layers.weights.tensor_of(f"{path}{weight}")
                    attention = tensor.removesuffix(".weight").rpartition(".")[0]
                    break
        if not largest.seen or not attention:
            raise InputRefused(
                f"{path} puts no keys and values into a cache that can be measured",
                hint="set serve.kv_cache_scales to none",
            )
        # In float32; keys of zeros take any scale.
        both = (torch.tensor(most) / _LARGEST for most in (largest.keys, largest.values))
        keys, values = (float(scale) or 1.0 for scale in both)
        found[attention] = keys, values
        progress(number + 1, len(layers.paths))
    return found


@dataclass(eq=False)
class _Largest:
    """Stands for the cache of a layer, and keeps the largest magnitudes that it gets."""

    valid: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    keys: float = 0.0
    values: float = 0.0
    seen: bool = False

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
