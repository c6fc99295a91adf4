"""What a decoder layer's matrices get as inputs while calibration text runs through it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TypeGuard

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


class Experts(nn.Module):
    """Names for what transformers' modules of all experts of a layer have."""

    gate_up_proj: nn.Parameter
    down_proj: nn.Parameter
    act_fn: Callable[[torch.Tensor], torch.Tensor]


@dataclass(slots=True)
class SharedInputGroup:
    """Matrices of a layer that get the same input."""

    linears: dict[str, nn.Linear]
    """By the name within the layer."""
    moments: Moments
    norm: nn.Module | None = None
    """The module whose output it is, if nothing else gets it."""


@dataclass(slots=True)
class Routed:
    """The inputs of a layer's experts, and which of them each expert gets."""

    module: Experts
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
        finding, first, hooks = _Origins(), not self._leaders, []
        for module in self._modules if first else ():
            if is_norm(module):
                hooks.append(module.register_forward_hook(finding.note_norm))
            elif list(module.parameters(recurse=False)) and module not in self._wanted.values():
                hooks.append(module.register_forward_pre_hook(finding.note_inputs))
        for name, module in self._wanted.items():
            hook = partial(self._linear, finding if first else None, name)
            hooks.append(module.register_forward_pre_hook(hook))
        if self.routed is not None:
            hooks.append(self.routed.module.register_forward_pre_hook(self._experts))
        try:
            yield
        finally:
            for handle in hooks:
                handle.remove()
        # Each group has its norm, unless something else gets that norm's output, too.
        for (memory, _), group in finding.groups.items():
            if memory not in finding.elsewhere:
                group.norm = finding.norms.get(memory)

    def _linear(
        self,
        finding: _Origins | None,
        name: str,
        module: nn.Linear,
        args: tuple[torch.Tensor, ...],
    ) -> None:
        if finding:
            place = _memory(args[0]), module.in_features
            if place in finding.groups:
                finding.groups[place].linears[name] = module
                return
            finding.kept.append(args[0])
            group = SharedInputGroup({name: module}, Moments.empty(module.in_features))
            finding.groups[place] = self._leaders[name] = group
            self.groups.append(group)
        if name in self._leaders:
            self._leaders[name].moments.add(self._texts(args[0]))

    def _experts(self, _: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if self.routed is not None:
            self.routed.rows.append(self._texts(args[0]))
            self.routed.chosen.append(self._texts(args[1]))

    def _texts(self, values: torch.Tensor) -> torch.Tensor:
        return values.reshape(len(self._valid), -1)[self._valid]


@dataclass(slots=True)
class _Origins:
    """Finds which matrices share an input, and the norm that it comes from, by tensors' memory.

    Tensors are kept until the layer has run, so that their memory is not used again meanwhile.
    """

    kept: list[torch.Tensor] = field(default_factory=list)
    norms: dict[int, nn.Module] = field(default_factory=dict)
    groups: dict[tuple[int, int], SharedInputGroup] = field(default_factory=dict)
    elsewhere: set[int] = field(default_factory=set)

    def note_norm(
        self, norm: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor
    ) -> None:
        self.kept.append(output)
        if len(args) == 1:  # linear attention's norm takes a gate, too
            self.norms[_memory(output)] = norm

    def note_inputs(self, _: torch.nn.Module, args: tuple[torch.Tensor | None, ...]) -> None:
        self.elsewhere |= {_memory(one) for one in args if isinstance(one, torch.Tensor)}


def is_experts(module: torch.nn.Module) -> TypeGuard[Experts]:
    """Return whether a module has all experts of a layer, as [experts, outputs, inputs]."""
    parts = (getattr(module, name, None) for name in ("gate_up_proj", "down_proj"))
    return all(isinstance(part, nn.Parameter) and part.dim() == 3 for part in parts)


def is_norm(module: torch.nn.Module) -> bool:
    """Return whether a module has nothing but one vector of weights."""
    own = list(module.named_parameters())
    return len(own) == 1 and own[0][0] == "weight" and own[0][1].dim() == 1


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
