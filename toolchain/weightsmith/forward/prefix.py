"""Computes the tokens that all prompts begin with once, such as a chat template's first lines."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

_WORTH = 128
"""Tokens that sharing must save: its own pass reads and converts every weight once more."""
_LENGTH_DEPENDENT = ("longrope", "'dynamic'")
"""Kinds of positions that are computed from the length of the whole text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefix:
    """The number of tokens that all prompts begin with, and a model's keys and values of them."""

    length: int = 0
    caches: Any = None
    """Configuration for new caches; None if the model's cache is not of plain keys and values."""
    states: tuple[tuple[int, torch.Tensor, torch.Tensor], ...] = ()
    """Each layer's number, keys and values [1, heads, length, width]."""

    def rows(self, count: int) -> Any:
        """Return a cache that holds the prefix in each of so many rows, or None."""
        from transformers import DynamicCache

        if self.caches is None:
            return None
        cache = DynamicCache(config=self.caches)
        for layer, keys, values in self.states:
            shape = (count, *keys.shape[1:]), (count, *values.shape[1:])
            cache.update(keys.expand(shape[0]), values.expand(shape[1]), layer)
        return cache


def shared_prefix(model: Any, prompts: Sequence[Sequence[int]], most: int) -> Prefix:
    """Return the tokens that all prompts begin with, read in one pass; none if it saves too little.

    At least one token of each prompt is left. `most` is how many tokens may follow a prompt.
    """
    caches = _plain(model, max(map(len, prompts), default=0) + most)
    length = _common(prompts)
    if caches is None or length * (len(prompts) - 1) < _WORTH:
        return Prefix(caches=caches)
    cache = Prefix(caches=caches).rows(1)
    ids = torch.tensor([prompts[0][:length]])
    # One logit is enough: the head of a small model is a fifth of its weights.
    model(input_ids=ids, cache=cache, use_cache=True, logits_to_keep=1)
    return Prefix(length=length, caches=caches, states=tuple(_states(cache)))


def depends_on_length(model: Any) -> bool:
    """Return whether the model's positions depend on the length of the whole text."""
    settings = str(model.config.get_text_config().to_dict())
    return any(kind in settings for kind in _LENGTH_DEPENDENT)


def align_right(cache: Any, holes: Sequence[int]) -> None:
    """Move each row's unused last columns, so many per row, to the front.

    A window or a position that counts columns then finds none between a row's tokens.
    """
    for layer in cache.layers:
        if layer.is_initialized:
            columns = torch.arange(layer.keys.shape[-2])
            order = (columns - torch.tensor(holes)[:, None]) % len(columns)
            for name in ("keys", "values"):
                old = getattr(layer, name)
                index = order[:, None, :, None].expand(old.shape)
                setattr(layer, name, old.gather(-2, index))


def _plain(model: Any, width: int) -> Any:
    """Return the configuration for caches of keys and values of every token, or None.

    None for models with other states, and for windows shorter than the text of `width` tokens.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    bare = model.get_base_model() if hasattr(model, "get_base_model") else model
    takes_one = "cache" in inspect.signature(bare.forward).parameters
    if not takes_one or getattr(bare, "_is_stateful", True) or depends_on_length(bare):
        return None
    config = bare.config.get_text_config(decoder=True)
    for layer in DynamicCache(config=config).layers:
        windowed = type(layer) is DynamicSlidingWindowLayer and layer.sliding_window > width
        if type(layer) is not DynamicLayer and not windowed:
            return None
    return config


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
