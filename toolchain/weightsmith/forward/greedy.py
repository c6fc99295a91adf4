"""Greedy answers of several views in one pass over the weights, using drafts if there are any."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import torch

Tokens = Sequence[int]
_LENGTH_DEPENDENT = ("longrope", "'dynamic'")
"""Kinds of positions that are computed from the length of the whole text."""
_ROUNDS = 2
"""How often a draft is read: after two wrong tokens, another pass would confirm few more."""
_CACHE_BYTES = 512 << 20
"""For the keys and values of one view's batch."""
_BATCH_TOKENS = 4096
"""Prompt tokens of one batch: enough to share each weight, few enough for memory."""


@dataclass(slots=True)
class Answers:
    """One view's tokens after each prompt, and the number of correct draft tokens."""

    tokens: list[list[int]]
    from_drafts: int = 0


@dataclass(slots=True, kw_only=True)
class Questions:
    """Tokenized prompts, the tokens that end an answer, and the maximum answer length."""

    prompts: Sequence[Tokens]
    ends: Sequence[int]
    most: int
    filler: int = 0
    drafts: Mapping[int, Tokens] = field(default_factory=dict)
    """Prompt's number -> draft of its answer."""


@torch.inference_mode()
def greedy(model: Any, asked: Questions, advance: Callable[[int], None]) -> Answers:
    """Return the most likely tokens after each prompt, including the token that ends an answer.

    A draft is checked in one pass. Its tokens are accepted up to the first that is not the most
    likely one; that token is replaced, and the tokens after it are checked again. The rest is
    generated. `advance` is called with the number of finished answers.
    """
    found: dict[int, list[int]] = {n: [] for n in range(len(asked.prompts))}
    rest, right = _usable_drafts(model, asked), 0
    for _ in range(_ROUNDS):
        rows = {n: [*asked.prompts[n], *found[n], *rest[n]] for n in rest}
        for batch in batches(rows, batch_tokens(model)):
            right += _verify(model, asked, batch, found, rest)
        rest = {n: draft for n, draft in rest.items() if draft and not _ended(found[n], asked)}
    left = [n for n in found if not _ended(found[n], asked)]
    advance(len(found) - len(left))
    rows = {n: [*asked.prompts[n], *found[n]] for n in left}
    for batch in batches(rows, batch_tokens(model), asked.most):
        _generate(model, asked, batch, found)
        advance(len(batch))
    return Answers([found[n] for n in range(len(asked.prompts))], right)


def _usable_drafts(model: Any, asked: Questions) -> dict[int, list[int]]:
    """Return the drafts that can be read in one pass, as far as their tokens are the model's.

    Returns none if the model's positions depend on the length of the text.
    """
    config = model.config.get_text_config()
    if any(kind in str(config.to_dict()) for kind in _LENGTH_DEPENDENT):
        return {}
    drafts = {}
    for number, draft in asked.drafts.items():
        known = takewhile(lambda token: token < config.vocab_size, draft[: asked.most])
        if asked.prompts[number] and (tokens := list(known)):
            drafts[number] = tokens
    return drafts


def batch_tokens(model: Any) -> int:
    """Return how many tokens of prompts and answers a batch may have, by the cache they need."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", 1)
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    held = getattr(config, "num_key_value_heads", None) or heads
    layers = getattr(config, "num_hidden_layers", 1)
    return min(_BATCH_TOKENS, _CACHE_BYTES // max(1, int(2 * 4 * layers * held * width)))


def batches(rows: Mapping[int, Tokens], most: int, more: int = 0) -> Iterator[list[int]]:
    """Yield batches of row numbers of similar length, to keep padding small."""
    batch: list[int] = []
    for number in sorted(rows, key=lambda n: (len(rows[n]), n)):
        if batch and (len(batch) + 1) * (len(rows[number]) + more) > most:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


def _ended(tokens: Tokens, asked: Questions) -> bool:
    return len(tokens) >= asked.most or bool(tokens and tokens[-1] in asked.ends)


def _verify(
    model: Any,
    asked: Questions,
    batch: Sequence[int],
    found: dict[int, list[int]],
    rest: dict[int, list[int]],
) -> int:
    """Check a batch's drafts in one pass; return the number of correct draft tokens."""
    rows = [[*asked.prompts[n], *found[n], *rest[n]] for n in batch]
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[asked.filler] * (width - len(row))] for row in rows])
    counts = [len(rest[n]) + 1 for n in batch]
    places = (
        torch.tensor([i for i, count in enumerate(counts) for _ in range(count)]),
        torch.tensor(
            [c for row, count in zip(rows, counts, strict=True)
             for c in range(len(row) - count, len(row))]
        ),
    )  # fmt: skip
    likeliest = torch.split(_likeliest(model, ids, places), counts)
    right = 0
    for number, chosen in zip(batch, likeliest, strict=True):
        draft, tokens = rest[number], chosen.tolist()
        same = next((i for i, t in enumerate(draft) if tokens[i] != t), len(draft))
        kept = [*draft[:same], tokens[same]]
        end = next((i for i, t in enumerate(kept) if t in asked.ends), len(kept) - 1)
        found[number] += kept[: end + 1]
        del found[number][asked.most :]
        rest[number] = draft[same + 1 :]
        right += same
    return right


def _likeliest(model: Any, ids: torch.Tensor, places: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Return the most likely next token at each place; causal models ignore right padding."""

    def select(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0][places].unsqueeze(0), *args[1:])

    hook = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        return torch.argmax(model(input_ids=ids, use_cache=False).logits[0], -1)
    finally:
        hook.remove()


def _generate(
    model: Any, asked: Questions, batch: Sequence[int], found: dict[int, list[int]]
) -> None:
    """Continue a batch, padded on the left; padding is masked and positions count without it."""
    from transformers import GenerationConfig

    rows = [[*asked.prompts[n], *found[n]] for n in batch]
    width = max(1, max(map(len, rows)))
    ids = torch.tensor([[*[asked.filler] * (width - len(row)), *row] for row in rows])
    mask = torch.tensor([[*[0] * (width - len(row)), *[1] * len(row)] for row in rows])
    # Always greedy; ignore sampling and penalties in generation_config.json.
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=asked.most - min(len(found[n]) for n in batch),
        pad_token_id=asked.filler,
        eos_token_id=list(asked.ends) or None,
    )
    model.generation_config = settings
    made = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
    for number, row in zip(batch, made[:, width:].tolist(), strict=True):
        end = next((i for i, token in enumerate(row) if token in asked.ends), len(row) - 1)
        found[number] += row[: end + 1]
        del found[number][asked.most :]
