"""Greedy answers of several views in one pass over the weights, using drafts if there are any."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import torch

from weightsmith.forward.heads import some_logits
from weightsmith.forward.memory import BATCH_BYTES, BATCH_TOKENS, token_bytes
from weightsmith.forward.prefix import Prefix, align_right, depends_on_length, shared_prefix

Tokens = Sequence[int]
Written = tuple[int, int, list[int]]
"""An answer's number, and tokens from a position on."""
Keep = Callable[[Sequence[Written]], None]
_ROUNDS = 2
"""How often a draft is read: after two wrong tokens, another pass would confirm few more."""
_PADDING = 128
"""Padding of a batch that is only read: another batch reads and converts every weight again."""
_HIDDEN = 4096
"""Hidden size if the configuration has none at its top: that of most models of 7B."""
_LEAVE = 4
"""A batch continues without its finished answers as soon as they are one in so many."""


@dataclass(slots=True)
class Answers:
    """One view's tokens after each prompt."""

    tokens: list[list[int]]
    margins: list[list[float]]
    """Of each token, the nats by which it was likelier than the second likeliest."""


@dataclass(slots=True)
class _Found:
    """The tokens of each answer so far, and their margins, by the prompt's number."""

    tokens: dict[int, list[int]]
    margins: dict[int, list[float]]

    def append(
        self, number: int, tokens: Tokens, margins: Sequence[float], asked: Questions
    ) -> None:
        """Add tokens to an answer, up to one that ends it."""
        ends = (i for i, token in enumerate(tokens) if token in asked.ends)
        end = next(ends, len(tokens) - 1) + 1
        asked.keep([(number, len(self.tokens[number]), list(tokens[:end]))])
        self.tokens[number] += tokens[:end]
        self.margins[number] += margins[:end]
        del self.tokens[number][asked.most :], self.margins[number][asked.most :]


@dataclass(slots=True, kw_only=True)
class Questions:
    """Tokenized prompts, the tokens that end an answer, and the maximum answer length."""

    prompts: Sequence[Tokens]
    ends: Sequence[int]
    most: int
    filler: int = 0
    drafts: Mapping[int, Tokens] = field(default_factory=dict)
    """Prompt's number -> draft of its answer."""
    batch_bytes: int = BATCH_BYTES
    """For one batch: keys and values, and a layer's activations."""
    keep: Keep = lambda _: None
    """Called with new tokens as soon as they are known, and again with those of a whole batch."""


@torch.inference_mode()
def greedy(model: Any, asked: Questions, advance: Callable[[int], None]) -> Answers:
    """Return the most likely tokens after each prompt, including the token that ends an answer.

    A draft is checked in one pass. Its tokens are accepted up to the first that is not the most
    likely one; that token is replaced, and the tokens after it are checked again. The rest is
    generated. `advance` is called with the number of finished answers.
    """
    numbers = range(len(asked.prompts))
    answers = _Found({n: [] for n in numbers}, {n: [] for n in numbers})
    found = answers.tokens
    shared = shared_prefix(model, asked.prompts, asked.most)
    rest = _usable_drafts(model, asked)
    for _ in range(_ROUNDS):
        rows = {n: [*asked.prompts[n], *found[n], *rest[n]] for n in rest}
        for batch in batches(rows, batch_tokens(model, asked), padding=_PADDING):
            _verify(model, asked, shared, batch, answers, rest)
        rest = {n: draft for n, draft in rest.items() if draft and not _ended(found[n], asked)}
    left = [n for n in found if not _ended(found[n], asked)]
    advance(len(found) - len(left))
    rows = {n: [*asked.prompts[n], *found[n]] for n in left}
    for batch in batches(rows, batch_tokens(model, asked), asked.most):
        _generate(model, asked, shared, batch, answers)
        advance(len(batch))
    return Answers([found[n] for n in numbers], [answers.margins[n] for n in numbers])


def _usable_drafts(model: Any, asked: Questions) -> dict[int, list[int]]:
    """Return the drafts that can be read in one pass, as far as their tokens are the model's.

    Returns none if the model's positions depend on the length of the text.
    """
    if depends_on_length(model):
        return {}
    config, drafts = model.config.get_text_config(), {}
    for number, draft in asked.drafts.items():
        known = takewhile(lambda token: token < config.vocab_size, draft[: asked.most])
        if asked.prompts[number] and (tokens := list(known)):
            drafts[number] = tokens
    return drafts


def batch_tokens(model: Any, asked: Questions) -> int:
    """Return how many tokens of prompts and answers a batch may have."""
    config = model.config.get_text_config()
    heads = _size(config, "num_attention_heads") or 1
    hidden = _size(config, "hidden_size") or _HIDDEN
    width = _size(config, "head_dim") or hidden // heads
    one = token_bytes(
        layers=_size(config, "num_hidden_layers") or 1,
        cached=(_size(config, "num_key_value_heads") or heads) * width,
        hidden=hidden,
        intermediate=_size(config, "intermediate_size") or 4 * hidden,
    )
    return min(BATCH_TOKENS, asked.batch_bytes // one)


def _size(config: Any, name: str) -> int:
    """Return a size, the largest if each layer has its own; 0 if there is none for all layers."""
    try:
        value = getattr(config, name)
    except (AttributeError, RuntimeError):  # transformers raises RuntimeError for mixed layers
        return 0
    sizes = value if isinstance(value, list | tuple) else [value]
    return max((size for size in sizes if isinstance(size, int)), default=0)


def batches(
    rows: Mapping[int, Tokens], most: int, more: int = 0, padding: int | None = None
) -> Iterator[list[int]]:
    """Yield batches of row numbers of similar length, to keep padding small.

    A batch has at most `most` tokens, `more` of them per row beyond the longest row's, and
    `padding` of them without meaning.
    """
    batch: list[int] = []
    tokens = 0
    for number in sorted(rows, key=lambda n: (len(rows[n]), n)):
        whole = (len(batch) + 1) * len(rows[number])
        tokens += len(rows[number])
        full = whole + (len(batch) + 1) * more > most
        if batch and (full or (padding is not None and whole - tokens > padding)):
            yield batch
            batch, tokens = [], len(rows[number])
        batch.append(number)
    if batch:
        yield batch


def _ended(tokens: Tokens, asked: Questions) -> bool:
    return len(tokens) >= asked.most or bool(tokens and tokens[-1] in asked.ends)


def _verify(
    model: Any,
    asked: Questions,
    shared: Prefix,
    batch: Sequence[int],
    found: _Found,
    rest: dict[int, list[int]],
) -> None:
    """Check a batch's drafts in one pass."""
    rows = [[*asked.prompts[n], *found.tokens[n], *rest[n]][shared.length :] for n in batch]
    cache = shared.rows(len(batch)) if shared.length else None
    counts = [len(rest[n]) + 1 for n in batch]
    read = _read(model, rows, counts, asked.filler, cache)
    for number, (tokens, margins) in zip(batch, read, strict=True):
        draft = rest[number]
        same = next((i for i, t in enumerate(draft) if tokens[i] != t), len(draft))
        kept = [*draft[:same], tokens[same]]
        found.append(number, kept, margins, asked)
        rest[number] = draft[same + 1 :]


def _read(
    model: Any, rows: Sequence[Tokens], counts: Sequence[int], filler: int, cache: Any = None
) -> list[tuple[list[int], list[float]]]:
    """Return the most likely token after each of a row's last tokens, so many per row, and margins.

    The rows continue those in `cache`. They are padded on the right, which causal models ignore.
    """
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[filler] * (width - len(row))] for row in rows])
    places = (
        torch.tensor([i for i, count in enumerate(counts) for _ in range(count)]),
        torch.tensor(
            [c for row, count in zip(rows, counts, strict=True)
             for c in range(len(row) - count, len(row))]
        ),
    )  # fmt: skip
    kept = {} if cache is None else {"cache": cache}
    parts = some_logits(model, ids, places, use_cache=bool(kept), **kept)
    found = [_best(part) for part in parts]
    both = (torch.cat(each) for each in zip(*found, strict=True))
    tokens, margins = (torch.split(each, list(counts)) for each in both)
    return [(a.tolist(), b.tolist()) for a, b in zip(tokens, margins, strict=True)]


def _best(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each row's most likely token, and by how much it exceeds the second one."""
    best = torch.argmax(logits, -1, keepdim=True)
    # Two maxima are found in a fraction of the time that topk takes.
    others = logits.scatter(-1, best, -torch.inf).amax(-1)
    return best[..., 0], logits.gather(-1, best)[..., 0] - others


def _generate(
    model: Any,
    asked: Questions,
    shared: Prefix,
    batch: Sequence[int],
    found: _Found,
) -> None:
    """Continue a batch to the end of every answer."""
    cache = shared.rows(len(batch))
    if cache is not None:
        rows = [[*asked.prompts[n], *found.tokens[n]][shared.length :] for n in batch]
        firsts = _read(model, rows, [1] * len(batch), asked.filler, cache)
        for number, first in zip(batch, firsts, strict=True):
            found.append(number, *first, asked)
        align_right(cache, [max(map(len, rows)) - len(row) for row in rows])
    left = list(batch)
    while kept := [i for i, n in enumerate(left) if not _ended(found.tokens[n], asked)]:
        if cache is not None and len(kept) < len(left):
            cache.batch_select_indices(torch.tensor(kept))
        left = [left[i] for i in kept]
        _decode(model, asked, left, found, cache)


def _decode(model: Any, asked: Questions, batch: Sequence[int], found: _Found, cache: Any) -> None:
    """Continue a batch until a part of its answers has ended; without a cache, until all have.

    It is padded on the left; padding is masked and positions count without it. The cache has every
    token but each row's last.
    """
    from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

    rows = [[*asked.prompts[n], *found.tokens[n]] for n in batch]
    width = max(1, *map(len, rows)) if cache is None else cache.get_seq_length() + 1
    ids = torch.tensor([[*[asked.filler] * (width - len(row)), *row] for row in rows])
    mask = torch.tensor([[*[0] * (width - len(row)), *[1] * len(row)] for row in rows])
    left = torch.tensor([asked.most - len(found.tokens[n]) for n in batch])
    ends = torch.tensor(list(asked.ends))

    def some_ended(ids: torch.Tensor, _: object, **__: object) -> torch.Tensor:
        new = ids[:, width:]
        ended = torch.isin(new, ends).any(1) | (left <= new.shape[1])
        return ended | (_LEAVE * ended.sum() >= len(ended))

    margins: list[torch.Tensor] = []

    def record(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        margins.append(_best(logits)[1])
        if (made := ids.shape[1] - width) > 0:
            last = zip(batch, ids[:, -1].tolist(), strict=True)
            asked.keep([(n, len(found.tokens[n]) + made - 1, [token]) for n, token in last])
        return logits

    # Always greedy; ignore sampling and penalties in generation_config.json.
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=int(left.max()),
        pad_token_id=asked.filler,
        eos_token_id=list(asked.ends) or None,
    )
    model.generation_config = settings
    made = model.generate(
        input_ids=ids,
        attention_mask=mask,
        generation_config=settings,
        logits_processor=LogitsProcessorList([record]),
        stopping_criteria=StoppingCriteriaList([] if cache is None else [some_ended]),
        **({} if cache is None else {"cache": cache}),
    )
    gaps = torch.stack(margins, 1).tolist() if margins else [[] for _ in batch]
    for number, row, gap in zip(batch, made[:, width:].tolist(), gaps, strict=True):
        found.append(number, row, gap, asked)
