"""The layers that PEFT wrapped, the deltas that it adds to them, and their stacked experts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn

from weightsmith.forward.experts import ExpertStack, LazyTensor, stacks_of
from weightsmith.forward.network import base_name
from weightsmith.forward.weights import BLOCK, Weights
from weightsmith.validating.elements import Factors, TensorComparison, compare_rows

if TYPE_CHECKING:
    from peft.tuners.tuners_utils import BaseTunerLayer

    from weightsmith.forward.kinds import Model
    from weightsmith.forward.products import Matrix


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
        from peft.tuners.lora import LoraLayer

        layers = tuner_layers(self.layer)
        # The change is proportional to PEFT's scaling, but not that of variants such as DoRA.
        if not all(isinstance(x, LoraLayer) and not getattr(x, "lora_variant", {}) for x in layers):
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


def is_approximate(layer: BaseTunerLayer) -> bool:
    """Return whether PEFT computes the layer's merged weight only approximately (KaSA's SVD)."""
    variants = [
        v for part in tuner_layers(layer) for v in getattr(part, "lora_variant", {}).values()
    ]
    return any("kasa" in type(variant).__name__.lower() for variant in variants)


def _active(layer: BaseTunerLayer) -> list[str]:
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


def compare_experts(
    site: Site, base: Weights, merged: Weights, tallies: MutableMapping[str, TensorComparison]
) -> None:
    """Compare all parameters of a module with experts; a tally's row is the expert's number."""
    stacks = stacks_of(site.layer)
    for part, name in site.parameters.items():
        tensor = merged.tensor_of(name) or name
        tally = tallies.setdefault(name, TensorComparison(tensor=tensor))
        if part in stacks:
            _compare_stack(tally, name, stacks[part], base, merged)
        else:
            values, found = base.whole(name), stored(merged, name)
            delta = torch.zeros_like(values)
            compare_rows(tally, 0, rows_of(values), rows_of(delta), rows_of(found))


def _compare_stack(
    tally: TensorComparison, name: str, stack: ExpertStack, base: Weights, merged: Weights
) -> None:
    base_experts, merged_experts = base.experts(name), merged.experts(name)
    whole = None if merged_experts else stored(merged, name)
    for number, reads in enumerate(base_experts):
        parts = [read() for read in reads]
        if whole is None:
            found = tuple(read() for read in merged_experts[number])
        else:
            found = torch.split(whole[number], [len(part) for part in parts])
        _compare_expert(tally, number, parts, found, _factors(stack, number))


def _compare_expert(
    tally: TensorComparison,
    number: int,
    base: Sequence[Matrix],
    merged: Sequence[Matrix],
    factors: Factors,
) -> None:
    start, columns = 0, factors.right.shape[1]
    step = max(1, BLOCK // columns)
    for before, after in zip(base, merged, strict=True):
        for first in range(0, len(before), step):
            rows, found = before[first : first + step], after[first : first + step]
            wide = torch.float64 if found.dtype == torch.float32 else torch.float32
            delta, known = factors.rows(start + first, len(rows), wide), tally.wrong
            compare_rows(tally, start + first, rows.to(wide), delta, found, factors)
            if tally.wrong and not known:
                tally.row, tally.column = number, tally.row * columns + tally.column
        start += len(before)


def _factors(stack: ExpertStack, number: int) -> Factors:
    """Return the sum of all adapters' deltas of one expert as one product."""
    _, rows, columns = stack.shape
    parts = stack.deltas(number)
    nothing = torch.zeros(rows, 0), torch.zeros(0, columns)
    scalings = [torch.full((len(right),), by, dtype=torch.float64) for _, right, by in parts]
    return Factors(
        left=torch.cat([nothing[0], *(left for left, _, _ in parts)], 1),
        right=torch.cat([nothing[1], *(right for _, right, _ in parts)]),
        scalings=torch.cat([torch.zeros(0, dtype=torch.float64), *scalings]),
    )


class RoundedStack(LazyTensor):
    """A stack, with adapters or without, whose experts are rounded to a type."""

    def __init__(self, stack: ExpertStack, kind: torch.dtype) -> None:
        """Round what is taken of `stack`; nothing is read before."""
        self._stack, self._kind, self.shape = stack, kind, stack.shape

    def __getitem__(self, index: int | slice | torch.Tensor) -> torch.Tensor:
        """Return what the stack has at the index, rounded, in float32."""
        found = self._stack[index]
        exact = found.whole() if isinstance(found, LazyTensor) else found
        return exact.to(self._kind).float()

    def whole(self) -> torch.Tensor:
        """Return all experts, rounded."""
        return self._stack.whole().to(self._kind).float()


@contextmanager
def rounded_experts(module: nn.Module, kinds: Mapping[str, torch.dtype]) -> Iterator[None]:
    """Run a module with its stacked experts rounded to these types, by attribute, in the block."""
    found = vars(module).items()
    stacks = {part: one for part, one in found if isinstance(one, ExpertStack) and part in kinds}
    for part, stack in stacks.items():
        object.__setattr__(module, part, RoundedStack(stack, kinds[part]))
    try:
        yield
    finally:
        for part, stack in stacks.items():
            object.__setattr__(module, part, stack)


def dtype_of(weights: Weights, parameter: str) -> torch.dtype:
    """Return a parameter's dtype in the file."""
    return next(weights.blocks(weights.tensors_of(parameter)[0]))[1].dtype


def stored(weights: Weights, parameter: str) -> torch.Tensor:
    """Return a parameter in its dtype in the file."""
    tensor = weights.tensor_of(parameter)
    if tensor:
        return weights.read(tensor)
    return weights.whole(parameter).to(dtype_of(weights, parameter))


def rows_of(values: torch.Tensor) -> torch.Tensor:
    """Return a tensor as a matrix with its first dimension as rows."""
    return values.reshape(len(values), -1) if values.dim() else values.reshape(1, 1)
