"""The layers that PEFT wrapped, and what it adds to each."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from toolchain.validating.elements import Factors
from toolchain.validating.network import base_name


def _none() -> Factors:
    raise LookupError("this layer's delta is not a product of two matrices")


@dataclass(slots=True, kw_only=True)
class Site:
    """One layer that PEFT wrapped, and the parameters of the base that it changes."""

    path: str
    layer: Any
    parameters: dict[str, str]
    """Parameter of the base layer (`weight`) -> the model's own name of it."""
    kind: str
    """`linear`, `conv1d`, `embedding`, or `other` where more than a product is added."""
    factors: Callable[[], Factors] = _none
    seen: bool = False


def sites(reference: Any) -> list[Site]:
    """Return the layers that PEFT wrapped, outermost, in the model's order."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    found: list[Site] = []
    inside: set[int] = set()
    for path, layer in reference.named_modules():
        if not isinstance(layer, BaseTunerLayer) or id(layer) in inside:
            continue
        inside |= {id(module) for module in layer.modules()}
        kind = _kind(layer)
        names = [name for name, _ in layer.get_base_layer().named_parameters()]
        found.append(
            Site(
                path=path,
                layer=layer,
                parameters={name: base_name(f"{path}.{name}") for name in names},
                kind=kind,
                factors=functools.partial(_factors, layer, kind) if kind != "other" else _none,
            )
        )
    return found


def tuner_layers(layer: Any) -> list[Any]:
    """Return PEFT's layers within one of them, itself included."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in layer.modules() if isinstance(module, BaseTunerLayer)]


def is_approximate(layer: Any) -> bool:
    """Say whether PEFT itself computes the layer's merged weight roughly, as KaSA's SVD does."""
    variants = [
        v for part in tuner_layers(layer) for v in getattr(part, "lora_variant", {}).values()
    ]
    return any("kasa" in type(variant).__name__.lower() for variant in variants)


def _active(layer: Any) -> list[str]:
    """Return the adapters that this very layer has."""
    return [name for name in layer.active_adapters if name in getattr(layer, "scaling", {})]


def _kind(layer: Any) -> str:
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


def _factors(layer: Any, kind: str) -> Factors:
    """Return the deltas as one product, as the base stores it; scalings are PEFT's own."""
    names = _active(layer)
    scalings = [layer.scaling[name] for name in names]
    if kind == "embedding":
        pairs = [(layer.lora_embedding_A[n].T, layer.lora_embedding_B[n].T) for n in names]
        return _product(pairs, scalings)
    straight = [(layer.lora_B[n].weight, layer.lora_A[n].weight) for n in names]
    if kind == "conv1d":
        return _product([(a.T, b.T) for b, a in straight], scalings)
    return _product(straight, scalings)


def _product(pairs: list[tuple[torch.Tensor, torch.Tensor]], scalings: list[float]) -> Factors:
    left = torch.cat([pair[0].detach().float() for pair in pairs], 1)
    right = torch.cat([pair[1].detach().float() for pair in pairs])
    each = [s for pair, s in zip(pairs, scalings, strict=True) for _ in range(len(pair[1]))]
    return Factors(
        left=left.contiguous(),
        right=right.contiguous(),
        scalings=torch.tensor(each, dtype=torch.float64),
    )
