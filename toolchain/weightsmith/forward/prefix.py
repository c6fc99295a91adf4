"""Computes the tokens that all prompts begin with once, such as a chat template's first lines."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from weightsmith.forward.drafts import MOST
from weightsmith.forward.libraries import running

_WORTH = 128
"""Tokens that sharing must save: its own pass reads and converts every weight once more."""
_LENGTH_DEPENDENT = ("longrope", "'dynamic'")
"""Kinds of positions that are computed from the length of the whole text."""
_OTHERWISE = frozenset({"doge", "dory", "gpt_neo", "mpt"})
"""Model types whose attention is not that of single keys and values.

GPT-Neo's windows and MPT's distances count columns, also those that hold no token. Doge multiplies
all values again in each layer. Dory adds layers to the cache that it is given.
"""
HOLES = 16
"""Columns of keys and values that hold no text's token, before they are removed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefix:
    """The number of tokens that all prompts begin with, and a model's keys and values of them."""

    length: int = 0
    layers: int = 0
    """Of a model's cache; 0 if it is not of plain keys and values."""
    positioned: bool = True
    """Whether the model takes each token's position."""
    states: tuple[tuple[int, torch.Tensor, torch.Tensor], ...] = ()
    """Each layer's number, keys and values [1, heads, length, width]."""

    def rows(self, count: int, more: int) -> Any:
        """Return the `Keys` of so many rows that begin so, with room for more tokens."""
        from weightsmith.forward.keys import Keys

        keys = Keys(self.layers, count, self.length + more, positioned=self.positioned)
        for layer, *states in self.states:
            keys.cache.update(*(one.expand(count, *one.shape[1:]) for one in states), layer)
        keys.keep(torch.full((count,), self.length), self.length)
        return keys


def empty_prefix(model: Any, prompts: Sequence[Sequence[int]], most: int) -> Prefix:
    """Return a prefix without tokens; it has no layers if the model's cache is of another kind.

    `most` is how many tokens may follow a prompt.
    """
    columns = max(map(len, prompts), default=0) + most + HOLES + min(most, MOST)
    return Prefix(layers=_plain_layers(model, columns), positioned=takes(model, "position_ids"))


def shared_prefix(model: Any, prompts: Sequence[Sequence[int]], empty: Prefix) -> Prefix:
    """Return the tokens that all prompts begin with, read in one pass; none if it saves too little.

    At least one token of each prompt is left. `empty` is the model's prefix without tokens.
    """
    length = _common(prompts)
    if not empty.layers or length * (len(prompts) - 1) < _WORTH:
        return empty
    cache = empty.rows(1, length).cache
    ids = torch.tensor([prompts[0][:length]])
    # One logit is enough: the head of a small model is a fifth of its weights.
    with running():
        model(input_ids=ids, cache=cache, use_cache=True, logits_to_keep=1)
    return replace(empty, length=length, states=tuple(_states(cache)))


def depends_on_length(model: Any) -> bool:
    """Return whether the model's positions depend on the length of the whole text."""
    settings = str(model.config.get_text_config().to_dict())
    return any(kind in settings for kind in _LENGTH_DEPENDENT)


def _plain_layers(model: Any, columns: int) -> int:
    """Return how many layers of keys and values of every token the model's cache has.

    0 for models with other states, and for windows that may be shorter than so many columns.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    own = bare(model)
    if not takes(model, "cache") or getattr(own, "_is_stateful", True) or depends_on_length(own):
        return 0
    config = own.config.get_text_config(decoder=True)
    if config.model_type in _OTHERWISE:
        return 0
    layers = DynamicCache(config=config).layers
    for layer in layers:
        windowed = type(layer) is DynamicSlidingWindowLayer and layer.sliding_window > columns
        if type(layer) is not DynamicLayer and not windowed:
            return 0
    return len(layers)


def bare(model: Any) -> Any:
    """Return transformers' model without PEFT's around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def takes(model: Any, name: str) -> bool:
    """Return whether a model is called with an argument of this name."""
    return name in inspect.signature(bare(model).forward).parameters


def _common(prompts: Sequence[Sequence[int]]) -> int:
    """Return how many tokens all prompts begin with, without any prompt's last one."""
    rows = [list(prompt) for prompt in prompts]
    first, last = min(rows, default=[]), max(rows, default=[])
    longest = min(map(len, rows), default=1) - 1
    same = (n for n, (a, b) in enumerate(zip(first, last, strict=False)) if a != b)
    return max(0, min(longest, next(same, longest)))


def _states(cache: Any) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    for number, layer in enumerate(cache.layers):
        if layer.is_initialized:
            yield number, layer.keys, layer.values
