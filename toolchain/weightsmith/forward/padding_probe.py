"""Finds models that answer otherwise in a batch than alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from weightsmith.forward.libraries import ModelFails, running
from weightsmith.forward.prefix import Prefix, bare, takes

_TOKENS = 4
"""Of a text that is read twice: for so few, this costs two or three passes over the weights."""
_ALIKE = 1e-3
"""Of the largest logit: sums in another order differ by a hundredth of that."""


def batches_change(model: Any, empty: Prefix, prompts: Sequence[Sequence[int]], pad: int) -> bool:
    """Return whether padding beside a text, or a hole in it, changes the model's next token.

    It does where positions are counted by column, as in BART's decoder, where a state has read the
    padding, as in RWKV, and where a token sees those behind it, as in BERT. A model with rotary
    embeddings that takes positions and has a plain cache is not asked: it reads its weights for
    answers alone. `empty` is the model's prefix without tokens.
    """
    text = list(max(prompts, key=len, default=[])[:_TOKENS])
    rotary = getattr(bare(model).config.get_text_config(), "rope_parameters", None)
    if len(text) < 2 or (empty.layers and rotary and takes(model, "position_ids")):
        return False
    alone = _last(model, text, use_cache=False)
    try:
        other = _with_a_hole(model, empty, text, pad) if empty.layers else _padded(model, text, pad)
    except ModelFails:  # its cache is of another kind
        return True
    return bool((alone - other).abs().max() > _ALIKE * alone.abs().max())


def _with_a_hole(model: Any, empty: Prefix, text: Sequence[int], pad: int) -> torch.Tensor:
    """Return the logits after a text of which a column before its last token was taken back."""
    keys, width = empty.rows(1, len(text) + 1), len(text)
    _last(model, [*text[:-1], pad], **keys.given(torch.tensor([width]), width))
    keys.keep(torch.tensor([width - 1]), width)
    return _last(model, text[-1:], **keys.given(torch.tensor([1]), 1))


def _padded(model: Any, text: Sequence[int], pad: int) -> torch.Tensor:
    """Return the logits after a text with padding before it, which is masked, and behind it."""
    mask = torch.tensor([[0, *[1] * (len(text) + 1)]])
    given: dict[str, Any] = {"attention_mask": mask, "use_cache": True}
    if takes(model, "position_ids"):
        given["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    return _last(model, [pad, *text, pad], place=-2, **given)


@running()
def _last(model: Any, ids: Sequence[int], place: int = -1, **given: Any) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=torch.tensor([list(ids)]), **given).logits
    return logits[0, place].float()
