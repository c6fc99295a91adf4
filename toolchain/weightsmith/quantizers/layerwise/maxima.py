"""The largest inputs of a model's matrices over calibration text, one layer at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from weightsmith.core.cpus import all_but_one
from weightsmith.forward.layers import Layers
from weightsmith.forward.libraries import load_tokenizer
from weightsmith.forward.threads import product
from weightsmith.quantizers.layerwise.observing import Routed, is_experts
from weightsmith.quantizers.matrices import Matrix
from weightsmith.quantizers.running import encoder, samples


def input_maxima(model: Path, lines: Sequence[str], found: Sequence[Matrix]) -> Mapping[str, float]:
    """Return the largest magnitude of each matrix's inputs, by the matrix's module.

    The experts of a layer have the same: what one of them did not see, another did. Raises
    InputRefused for too little text, text that the model cannot read, and if the checkpoint lacks a
    tensor.
    """
    torch.set_num_threads(all_but_one())
    layers = Layers(model, samples(list(lines), encoder(load_tokenizer(model))))
    own = {matrix.tensor: matrix.module for matrix in found if ".experts." not in matrix.module}
    most: dict[str, float] = {}
    for number, path in enumerate(layers.paths):
        prefix = f"{path}."
        stored = f"{layers.stored_path(number)}."
        experts = [
            m.module for m in found if m.module.startswith(stored) and ".experts." in m.module
        ]
        with layers.loaded(number) as layer:
            _run(layers, number, _Maxima(layer, layers, prefix, own, experts, most))
    return most


class _Maxima:
    """Hooks on a layer's matrices."""

    def __init__(
        self,
        layer: torch.nn.Module,
        layers: Layers,
        prefix: str,
        own: Mapping[str, str],
        experts: Sequence[str],
        most: dict[str, float],
    ) -> None:
        self.valid = torch.empty(0)
        self._most, self._experts = most, experts
        self.hooks = []
        for name, module in layer.named_modules():
            tensor = layers.weights.tensor_of(f"{prefix}{name}.weight")
            if tensor in own:
                self.hooks.append(module.register_forward_pre_hook(self._linear(own[tensor])))
            elif is_experts(module):
                self.hooks.append(module.register_forward_pre_hook(self._routed))

    def _linear(self, module: str) -> Any:
        return lambda _, args: self._see([module], args[0])

    def _see(self, modules: Sequence[str], values: torch.Tensor) -> None:
        seen = float(values.reshape(len(self.valid), -1)[self.valid].abs().max())
        for module in modules:
            self._most[module] = max(self._most.get(module, 0.0), seen)

    def _routed(self, module: Any, args: tuple[torch.Tensor, ...]) -> None:
        last = [name for name in self._experts if name.endswith(("down_proj", ".w2"))]
        self._see([name for name in self._experts if name not in last], args[0])
        rows, chosen = (value.reshape(len(self.valid), -1)[self.valid] for value in args[:2])
        routed = Routed(module, "", [rows], [chosen])
        for expert in range(len(module.down_proj)):
            routed_rows, count = routed.inputs(expert, 0)
            if count:
                gate, up = product(routed_rows, module.gate_up_proj[expert]).chunk(2, 1)
                inner = float((module.act_fn(gate) * up).abs().max())
                self._most |= {name: max(self._most.get(name, 0.0), inner) for name in last}


def _run(layers: Layers, number: int, maxima: _Maxima) -> None:
    """Run a loaded layer, and move the states behind it.

    Raises InputRefused if they are not finite.
    """
    states = []
    for batch, one in enumerate(layers.batches):
        maxima.valid = one.valid
        states.append(layers.run(number, batch))
    layers.require_finite(number, states)
    layers.states = states
    for hook in maxima.hooks:
        hook.remove()
