"""The layers that PEFT wrapped, and the deltas that it adds to them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn

from weightsmith.forward.network import base_name
from weightsmith.forward.weights import Weights
from weightsmith.validating.elements import Factors

if TYPE_CHECKING:
    from peft.tuners.tuners_utils import BaseTunerLayer

    from weightsmith.forward.kinds import Model


def _none() -> list[Factors]:
    raise LookupError("this layer's delta is not a product of two matrices")


@dataclass(slots=True, kw_only=True)
class Site:
    """One layer that PEFT wrapped, and the parameters of the base that it changes."""

    path: str
    layer: BaseTunerLayer
    parameters: dict[str, str]
    """Parameter of the base layer (`weight`) -> its name in the model."""
    kind: str
    """`linear`, `conv1d`, `embedding`, or `other` if the delta is not a plain product."""
    parts: Callable[[], list[Factors]] = _none
    """Each adapter's delta as a product, in the base's layout, with PEFT's scalings."""
    seen: bool = False
    weights: dict[str, float] = field(default_factory=dict)
    """Adapter -> weight of its change, if PEFT's scaling cannot express it."""

    def apply_weights(self, weights: Mapping[str, float]) -> None:
        """Apply the adapters' weights to their changes of this layer."""
        layers = tuner_layers(self.layer)
        if not all(_is_linear_in_scaling(layer) for layer in layers):
            self.weights = dict(weights)
            return
        for layer in layers:
            for name in layer.scaling.keys() & weights.keys():
                layer.scaling[name] *= weights[name]

    def factors(self) -> Factors:
        """Return the sum of all adapters' deltas as one product."""
        parts = self.parts()
        return Factors(
            left=torch.cat([part.left for part in parts], 1).contiguous(),
            right=torch.cat([part.right for part in parts]).contiguous(),
            scalings=torch.cat([part.scalings for part in parts]),
        )


def sites(reference: Model, base: Weights) -> list[Site]:
    """Return the layers that PEFT wrapped, outermost, in the model's order.

    A layer whose weight is rows of a tensor of `base` is of the kind `other`.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    found: list[Site] = []
    inside: set[int] = set()
    for path, layer in reference.named_modules():
        if not isinstance(layer, BaseTunerLayer) or id(layer) in inside:
            continue
        inside |= {id(module) for module in layer.modules()}
        names = [name for name, _ in layer.get_base_layer().named_parameters()]
        kind = _kind(layer) if base.tensor_of(base_name(f"{path}.weight")) else "other"
        found.append(
            Site(
                path=path,
                layer=layer,
                parameters={name: base_name(f"{path}.{name}") for name in names},
                kind=kind,
                parts=functools.partial(_parts, layer, kind) if kind != "other" else _none,
            )
        )
    return found


def tuner_layers(layer: BaseTunerLayer) -> list[BaseTunerLayer]:
    """Return PEFT's layers inside one of them, including itself."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in layer.modules() if isinstance(module, BaseTunerLayer)]


def _is_linear_in_scaling(layer: BaseTunerLayer) -> bool:
    """Return whether the change is proportional to PEFT's scaling (not so for DoRA)."""
    from peft.tuners.lora import LoraLayer

    return isinstance(layer, LoraLayer) and not getattr(layer, "lora_variant", {})


def is_approximate(layer: BaseTunerLayer) -> bool:
    """Return whether PEFT computes the layer's merged weight only approximately (KaSA's SVD)."""
    variants = [
        v for part in tuner_layers(layer) for v in getattr(part, "lora_variant", {}).values()
    ]
    return any("kasa" in type(variant).__name__.lower() for variant in variants)


def _active(layer: BaseTunerLayer) -> list[str]:
    """Return the adapters of this layer."""
    return [name for name in layer.active_adapters if name in getattr(layer, "scaling", {})]


def _kind(layer: BaseTunerLayer) -> str:
    from peft.tuners import lora
    from transformers.pytorch_utils import Conv1D

    base, names = layer.get_base_layer(), _active(layer)
    biases = getattr(layer, "lora_bias", {})
    if not names or getattr(layer, "lora_variant", {}) or any(biases.get(n) for n in names):
        return "other"
    if type(layer) is lora.Embedding and type(base) is nn.Embedding:
        return "embedding"
    if type(layer) is not lora.Linear or not all(name in layer.lora_A for name in names):
        return "other"
    kinds = {nn.Linear: "linear", Conv1D: "conv1d"}
    return kinds.get(type(base), "other")


def _parts(layer: BaseTunerLayer, kind: str) -> list[Factors]:
    found = []
    for name in _active(layer):
        if kind == "embedding":
            left, right = layer.lora_embedding_A[name].T, layer.lora_embedding_B[name].T
        else:
            left, right = layer.lora_B[name].weight, layer.lora_A[name].weight
            if kind == "conv1d":
                left, right = right.T, left.T
        scalings = torch.full((len(right),), layer.scaling[name], dtype=torch.float64)
        left, right = left.detach().float(), right.detach().float()
        found.append(Factors(left=left, right=right, scalings=scalings))
    return found
