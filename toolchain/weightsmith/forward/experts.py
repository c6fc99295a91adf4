"""Stacked experts of which a walk reads only those that get tokens, one at a time.

Reading a stack as a whole took 2.4 GB in float32 for 128 experts of Qwen3-30B's shapes, for each
view and each token; so a view's stack gives single experts, and transformers runs its own loop over
them. Architectures that multiply with all experts at once (Llama 4) still read the whole stack, and
those with transposed matrices (gpt-oss) one expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import nn
from torch.nn import functional

from weightsmith.forward.libraries import ModelFails
from weightsmith.forward.lockstep import Key, Lockstep
from weightsmith.forward.products import Matrix

if TYPE_CHECKING:
    from peft.tuners.tuners_utils import BaseTunerLayer


Parts: TypeAlias = Sequence[Callable[[], Matrix]]
"""Read the matrices [rows, columns] of one expert, which follow each other."""
Delta: TypeAlias = tuple[torch.Tensor, torch.Tensor, float]
"""Of all experts: left [experts, rows, rank], right [experts, rank, columns], and their factor."""
Deltas: TypeAlias = Callable[[], Sequence[Delta]]


class LazyTensor:
    """Stands for a tensor in float32 that is read only if code asks for more than its shape."""

    dtype, device, requires_grad = torch.float32, torch.device("cpu"), False
    shape: torch.Size

    def whole(self) -> torch.Tensor:
        """Return the tensor."""
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the tensor."""
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.whole(), name)

    def __len__(self) -> int:
        """Return the length of the first dimension."""
        return self.shape[0]

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Multiply by an expert's matrix in the lockstep; read it for everything else."""
        named = dict(kwargs or {})
        if func is functional.linear and not named and isinstance(args[1], Expert):
            product, bias = args[1].multiply(args[0]), args[2] if args[2:] else None
            return product if bias is None else product + bias
        read = [one.whole() if isinstance(one, LazyTensor) else one for one in args]
        for name, one in named.items():
            named[name] = one.whole() if isinstance(one, LazyTensor) else one
        return func(*read, **named)


class Expert(LazyTensor):
    """One expert's matrix."""

    def __init__(self, key: Key, parts: Parts, deltas: Sequence[Delta], lockstep: Lockstep) -> None:
        """Open the files of its parts."""
        self._key, self._lockstep = key, lockstep
        self._parts, self._deltas = [read() for read in parts], deltas
        rows = sum(part.shape[0] for part in self._parts)
        self.shape = torch.Size((rows, *self._parts[0].shape[1:]))

    def multiply(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return inputs [..., columns] times the matrix transposed, in float32."""
        products = [
            self._lockstep.multiply((*self._key, number), inputs, part)
            for number, part in enumerate(self._parts)
        ]
        whole = torch.cat(products, -1) if products[1:] else products[0]
        for left, right, factor in self._deltas:
            whole = whole + (inputs @ right.T) @ left.T * factor
        return whole

    def whole(self) -> torch.Tensor:
        """Return the matrix."""
        matrix = torch.cat([part[:].float() for part in self._parts])
        for left, right, factor in self._deltas:
            matrix += left @ right * factor
        return matrix


class ExpertStack(LazyTensor):
    """A parameter [experts, rows, columns]; an expert taken by its number is an `Expert`."""

    def __init__(
        self, key: Key, place: int, experts: Sequence[Parts], deltas: Deltas, lockstep: Lockstep
    ) -> None:
        """Let `deltas` say what adapters add to it when an expert is taken.

        `place` tells it apart from the module's other stacks, which have the same `key`.
        """
        self._key, self._place, self._experts = key, place, experts
        self._deltas, self._lockstep = deltas, lockstep
        self.shape = torch.Size((len(experts), *self._expert(0).shape))

    def __getitem__(self, index: int | slice | torch.Tensor) -> Expert | torch.Tensor:
        """Return one expert, or what the whole tensor has at any other index."""
        if isinstance(index, torch.Tensor) and not index.dim():
            index = int(index)
        return self._expert(index) if type(index) is int else self.whole()[index]

    def __iter__(self) -> Iterator[Expert]:
        """Return the experts."""
        return map(self._expert, range(len(self)))

    def deltas(self, number: int) -> Sequence[Delta]:
        """Return an expert's deltas: left [rows, rank], right [rank, columns], and their factor."""
        return [(left[number], right[number], by) for left, right, by in self._deltas()]

    def whole(self) -> torch.Tensor:
        """Return all experts."""
        return torch.stack([one.whole() for one in self])

    def _expert(self, number: int) -> Expert:
        number = range(len(self._experts))[number]
        key = (*self._key, number, self._place)
        return Expert(key, self._experts[number], self.deltas(number), self._lockstep)


def read_one_by_one(
    module: torch.nn.Module,
    stacks: Mapping[str, Sequence[Parts]],
    key: Key,
    lockstep: Lockstep,
    deltas: Mapping[str, Deltas],
) -> None:
    """Replace a module's stacked parameters by ones that read single experts.

    `deltas` has what adapters add, by parameter. Transformers then uses its loop over experts.
    """
    for place, (name, experts) in enumerate(stacks.items()):
        stack = ExpertStack(key, place, experts, deltas.get(name, tuple), lockstep)
        if stack.shape != getattr(module, name).shape:
            shapes = f"{[*stack.shape]}, not {[*getattr(module, name).shape]}"
            raise ModelFails(f"{name} has shape {shapes}")
        delattr(module, name)
        object.__setattr__(module, name, stack)
    if config := getattr(module, "config", None):
        config._experts_implementation = "eager"  # noqa: SLF001 - transformers' own switch


def wrapped_experts(layer: torch.nn.Module) -> tuple[torch.nn.Module, Mapping[str, Deltas]] | None:
    """Return the module below PEFT's wrappers of stacked parameters, and what these add to each.

    The wrappers then only call it. None if another kind of layer is among them, or biases.
    """
    from peft.tuners.lora.layer import ParamWrapper

    added: dict[str, list[Any]] = {}
    inner = layer
    while isinstance(inner, ParamWrapper):
        if inner.num_experts < 2 or any(inner.lora_bias.values()):
            return None
        added.setdefault(inner.parameter_name, []).append(inner)
        inner = inner.base_layer
    if not added or any(hasattr(part, "base_layer") for part in inner.children()):
        return None
    return inner, {name: _deltas(all_) for name, all_ in added.items()}


def call_only(layer: BaseTunerLayer, inner: torch.nn.Module) -> None:
    """Let PEFT's wrappers around a module do nothing but call it."""
    while layer is not inner:
        below = layer.base_layer
        object.__setattr__(layer, "forward", lambda *args, _of=below, **named: _of(*args, **named))
        layer = below


def _deltas(wrappers: Sequence[BaseTunerLayer]) -> Deltas:
    def factors() -> list[Delta]:
        return [
            wrapper.get_delta_factors(name)
            for wrapper in wrappers
            if not wrapper.disable_adapters
            for name in wrapper.active_adapters
            if name in wrapper.lora_A
        ]

    return factors


def stacks_of(layer: BaseTunerLayer) -> Mapping[str, ExpertStack]:
    """Return the stacks of the module below PEFT's wrappers."""
    return {
        n: one for n, one in vars(layer.get_base_layer()).items() if isinstance(one, ExpertStack)
    }


def is_stacked(module: torch.nn.Module, name: str) -> bool:
    """Return whether a parameter may be a stack of matrices.

    Not a convolution's filter, and not a vector of shape [1, 1, columns] such as RWKV's.
    """
    convolution = isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    shape = getattr(module, name).shape
    return not convolution and len(shape) == 3 and shape[0] > 1
