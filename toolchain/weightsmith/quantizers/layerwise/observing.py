"""What a decoder layer's matrices get as inputs while calibration text runs through it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from weightsmith.forward.threads import product

_SKETCH = 256
"""Rows that stand for all inputs where candidates are compared."""
_SEED = 20


@dataclass(slots=True)
class Moments:
    """Sums over all inputs [inputs] of a matrix, in float32."""

    gram: torch.Tensor
    """[inputs, inputs]: sum of x x^T."""
    magnitude: torch.Tensor
    """[inputs]: sum of |x|."""
    sketch: torch.Tensor
    """[rows, inputs], with nearly the same Gram matrix: each input, with a random sign, is added to
    one row (count sketch; Charikar, Chen and Farach-Colton, 2002)."""
    tokens: int = 0

    @classmethod
    def empty(cls, inputs: int) -> Moments:
        """Return those of no inputs."""
        return cls(torch.zeros(inputs, inputs), torch.zeros(inputs), torch.zeros(_SKETCH, inputs))

    @classmethod
    def of(cls, rows: torch.Tensor) -> Moments:
        """Return those of inputs [tokens, inputs]."""
        made = cls.empty(rows.shape[1])
        made.add(rows)
        return made

    def add(self, rows: torch.Tensor) -> None:
        """Add inputs [tokens, inputs]."""
        turned = rows.T.contiguous()
        self.gram += product(turned, turned)
        self.magnitude += rows.abs().sum(0)
        count = len(rows)
        places = torch.arange(self.tokens, self.tokens + count)
        draw = torch.Generator().manual_seed(_SEED + self.tokens)
        signs = torch.randint(0, 2, (count, 1), generator=draw).mul_(2).sub_(1)
        self.sketch.index_add_(0, places % _SKETCH, rows * signs)
        self.tokens += count

    def copy(self) -> Moments:
        """Return a copy, which `scale` and `add` do not change."""
        return Moments(self.gram.clone(), self.magnitude.clone(), self.sketch.clone(), self.tokens)

    def scale(self, factors: torch.Tensor) -> None:
        """Divide every input by its factor [inputs]."""
        self.gram /= factors[:, None] * factors
        self.magnitude /= factors
        self.sketch /= factors


@dataclass(slots=True)
class SharedInputGroup:
    """Matrices of a layer that get the same input."""

    linears: dict[str, Any]
    """Name within the layer -> nn.Linear."""
    moments: Moments
    norm: Any = None
    """The module whose output it is, if nothing else gets it."""


@dataclass(slots=True)
class Routed:
    """The inputs of a layer's experts, and which of them each expert gets."""

    module: Any
    name: str
    rows: list[torch.Tensor] = field(default_factory=list)
    chosen: list[torch.Tensor] = field(default_factory=list)

    def inputs(self, expert: int, least: int) -> tuple[torch.Tensor, int]:
        """Return an expert's inputs and their number; if it is less than `least`, all inputs."""
        if len(self.rows) > 1:  # joined once, not for each of a hundred experts
            self.rows, self.chosen = [torch.cat(self.rows)], [torch.cat(self.chosen)]
        rows, mask = self.rows[0], (self.chosen[0] == expert).any(1)
        count = int(mask.sum())
        return (rows if count < least else rows[mask]), count


class Observer:
    """Records the inputs of a layer's matrices while it runs."""

    def __init__(self, layer: torch.nn.Module, wanted: Sequence[str]) -> None:
        """`wanted` are the names, within the layer, of the linear layers to look at."""
        named = dict(layer.named_modules())
        self.groups: list[SharedInputGroup] = []
        experts = [Routed(module, name) for name, module in named.items() if is_experts(module)]
        self.routed = experts[0] if experts else None
        self._wanted = {name: named[name] for name in wanted}
        self._modules = list(named.values())
        self._leaders: dict[str, SharedInputGroup] = {}
        self._valid = torch.empty(0)

    @contextmanager
    def watching(self, valid: torch.Tensor) -> Iterator[None]:
        """Record what runs in this context; `valid` [positions] tells text from padding."""
        self._valid = valid
        finding = _Origins(self) if not self._leaders else None
        hooks = finding.hooks(self._modules) if finding else []
        for name, module in self._wanted.items():
            hooks.append(module.register_forward_pre_hook(partial(self._linear, finding, name)))
        if self.routed is not None:
            hooks.append(self.routed.module.register_forward_pre_hook(self._experts))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        if finding:
            finding.settle()

    def _linear(self, finding: _Origins | None, name: str, module: Any, args: Any) -> None:
        if finding and finding.joined(name, module, args[0]):
            return
        if finding:
            self._leaders[name] = finding.group(name, module, args[0])
            self.groups.append(self._leaders[name])
        if name in self._leaders:
            self._leaders[name].moments.add(self._texts(args[0]))

    def _experts(self, _: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if self.routed is not None:
            self.routed.rows.append(self._texts(args[0]))
            self.routed.chosen.append(self._texts(args[1]))

    def _texts(self, values: torch.Tensor) -> torch.Tensor:
        return values.reshape(len(self._valid), -1)[self._valid]


class _Origins:
    """Finds which matrices share an input, and the norm that it comes from, by tensors' memory.

    Tensors are kept until the layer has run, so that their memory is not used again meanwhile.
    """

    def __init__(self, observer: Observer) -> None:
        self._own = {id(module) for module in observer._wanted.values()}  # noqa: SLF001
        self._kept: list[torch.Tensor] = []
        self._norms: dict[int, Any] = {}
        self._groups: dict[tuple[int, int], SharedInputGroup] = {}
        self._elsewhere: set[int] = set()

    def hooks(self, modules: Sequence[torch.nn.Module]) -> list[Any]:
        """Return hooks on the modules that make or take an input of a matrix."""
        found = [m.register_forward_hook(self._made) for m in modules if is_norm(m)]
        others = [m for m in modules if list(m.parameters(recurse=False)) and not is_norm(m)]
        others = [module for module in others if id(module) not in self._own]
        return found + [module.register_forward_pre_hook(self._note_inputs) for module in others]

    def _made(
        self, norm: torch.nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor
    ) -> None:
        self._kept.append(output)
        if len(args) == 1:  # linear attention's norm takes a gate, too
            self._norms[_memory(output)] = norm

    def _note_inputs(self, _: torch.nn.Module, args: tuple[torch.Tensor | None, ...]) -> None:
        self._elsewhere |= {_memory(one) for one in args if isinstance(one, torch.Tensor)}

    def joined(self, name: str, module: Any, inputs: torch.Tensor) -> bool:
        """Add a matrix to the group that already has its input; return whether there is one."""
        group = self._groups.get((_memory(inputs), module.in_features))
        if group is not None:
            group.linears[name] = module
        return group is not None

    def group(self, name: str, module: Any, inputs: torch.Tensor) -> SharedInputGroup:
        """Return a new group for a matrix."""
        self._kept.append(inputs)
        made = SharedInputGroup({name: module}, Moments.empty(module.in_features))
        self._groups[_memory(inputs), module.in_features] = made
        return made

    def settle(self) -> None:
        """Give each group its norm, unless something else gets that norm's output, too."""
        for (memory, _), group in self._groups.items():
            if memory not in self._elsewhere:
                group.norm = self._norms.get(memory)


def is_experts(module: torch.nn.Module) -> bool:
    """Return whether a module has all experts of a layer, as [experts, outputs, inputs]."""
    parts = (getattr(module, name, None) for name in ("gate_up_proj", "down_proj"))
    return all(isinstance(part, nn.Parameter) and part.dim() == 3 for part in parts)


def is_norm(module: torch.nn.Module) -> bool:
    """Return whether a module has nothing but one vector of weights."""
    own = list(module.named_parameters())
    return len(own) == 1 and own[0][0] == "weight" and own[0][1].dim() == 1


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
