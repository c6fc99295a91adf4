"""A model's decoder layers one at a time, over token ids: what calibration runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from weightsmith.core.errors import InputRefused
from weightsmith.forward.lockstep import Lockstep
from weightsmith.forward.network import (
    decoder_layers,
    decoder_of,
    filled,
    skeleton_with_weights,
)
from weightsmith.forward.threads import product
from weightsmith.forward.views import require_complete, stream

if TYPE_CHECKING:
    from transformers import Cache


_CACHE = frozenset({"cache", "past_key_values"})
"""A layer's argument for keys and values; transformers has renamed it."""
TOKENS = 4096
"""Of the batches that run beside each other, padding included."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Texts that run together, padded on the right, where a causal model does not look."""

    ids: torch.Tensor
    """[texts, longest]"""
    valid: torch.Tensor
    """[texts * longest]: which are tokens of a text."""


class Layers:
    """The decoder of a folder's model, whose layers get their weights one after the other."""

    def __init__(self, root: Path, samples: Sequence[Sequence[int]], tokens: int = TOKENS) -> None:
        """Run the embeddings, on batches of at most so many `tokens`, or of one text.

        Raises InputRefused if the checkpoint lacks a tensor, or a token of the samples its row.
        """
        self.model, self.weights = skeleton_with_weights(root)
        require_complete(root, self.model, self.weights)
        decoder = decoder_of(self.model)
        self.layers: list[Any] = decoder_layers(decoder)
        paths = {id(module): path for path, module in self.model.named_modules()}
        self.paths = [paths[id(layer)] for layer in self.layers]
        stream(self.model, self.weights, Lockstep(), 0, self.layers)
        count = self.model.get_input_embeddings().weight.shape[0]
        largest = max((max(sample) for sample in samples), default=0)
        if largest >= count:
            raise InputRefused(
                f"the tokenizer makes token {largest} of the calibration text, and the model's"
                f" embedding has only {count} rows",
                hint="use the tokenizer that the model was trained with",
            )
        self.batches = _batches(samples, tokens)
        self._calls: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = [[] for _ in self.layers]
        """What the decoder passes to each layer beside each batch's states."""
        self.states = [self._entered(decoder, batch) for batch in self.batches]
        """Of each batch, in front of the next layer: float32 [texts, longest, hidden]."""

    def _entered(self, decoder: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Return the first layer's input, and keep what the decoder passes to each layer."""
        first: list[torch.Tensor] = []

        def recording(number: int) -> Callable[..., torch.Tensor]:
            def forward(hidden_states: torch.Tensor, *more: Any, **named: Any) -> torch.Tensor:
                first.append(hidden_states)
                self._calls[number].append((more, named))
                return hidden_states

            return forward

        for number, layer in enumerate(self.layers):
            layer.forward = recording(number)
        try:
            # Without inference mode, so that gradients may be taken of layers that get this.
            with torch.no_grad():
                decoder(input_ids=batch.ids, use_cache=False)
        finally:
            for layer in self.layers:
                del layer.forward
        return first[0]

    def stored_path(self, number: int) -> str:
        """Return a layer's path in the checkpoint, where the model's part may have another name."""
        path: str = self.paths[number]
        for name, _ in self.layers[number].named_parameters():
            tensor = self.weights.tensor_of(f"{path}.{name}")
            if tensor.endswith(f".{name}"):
                return tensor.removesuffix(f".{name}")
        return path

    @contextmanager
    def with_weights(self, number: int) -> Iterator[torch.nn.Module]:
        """Give a layer its weights in float32 for as long as the context lasts, for any thread."""
        layer = self.layers[number]
        for module in layer.modules():
            if type(module) is nn.Linear:
                setattr(module, "forward", partial(_linear, module))  # noqa: B010
        with filled(layer, self.paths[number], self.weights):
            yield layer

    @contextmanager
    def loaded(self, number: int) -> Iterator[torch.nn.Module]:
        """Give a layer its weights in float32 as long as the context lasts; nothing is trained."""
        with self.with_weights(number) as layer, torch.inference_mode():
            yield layer

    def run(self, number: int, batch: int, cache: Cache = None) -> torch.Tensor:
        """Return what a loaded layer makes of a batch's states; `cache` gets keys and values."""
        more, named = self._calls[number][batch]
        if cache is not None:
            named = named | dict.fromkeys(_CACHE & named.keys(), cache)
        made = self.layers[number](self.states[batch], *more, **named)
        states: torch.Tensor = made[0] if isinstance(made, tuple) else made
        return states

    def require_finite(self, number: int, states: Sequence[torch.Tensor]) -> None:
        """Raise InputRefused if a loaded layer made NaN or infinite values of the text."""
        if all(_is_finite(one) for one in states):
            return
        layer, path = self.layers[number], self.paths[number]
        damaged = [name for name, part in layer.named_parameters() if not _is_finite(part)]
        raise InputRefused(
            f"{path}.{damaged[0]} has NaN or infinite weights"
            if damaged
            else f"{path} makes NaN or infinite values of the calibration text",
            hint="check the base and the adapters: `weightsmith validate` compares them",
        )


def _is_finite(values: torch.Tensor) -> bool:
    # The sum of finite values is finite as a rule, and takes a quarter of the time.
    return bool(torch.isfinite(values.sum())) or bool(torch.isfinite(values).all())


def _linear(module: Any, inputs: torch.Tensor) -> torch.Tensor:
    rows = inputs.reshape(-1, inputs.shape[-1])
    found = product(rows, module.weight).reshape(*inputs.shape[:-1], -1)
    return found if module.bias is None else found + module.bias


def _batches(samples: Sequence[Sequence[int]], tokens: int) -> list[Batch]:
    """Return batches of texts of similar length; a text of its own if it is long."""
    found: list[Batch] = []
    group: list[Sequence[int]] = []
    for sample in sorted(samples, key=len, reverse=True):
        if group and len(group[0]) * (len(group) + 1) > tokens:
            found.append(_padded(group))
            group = []
        group.append(sample)
    return [*found, _padded(group)] if group else found


def _padded(group: Sequence[Sequence[int]]) -> Batch:
    longest = len(group[0])
    ids = torch.tensor([[*sample, *[0] * (longest - len(sample))] for sample in group])
    lengths = torch.tensor([len(sample) for sample in group])
    return Batch(ids, (torch.arange(longest) < lengths[:, None]).reshape(-1))
