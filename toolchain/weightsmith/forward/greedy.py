"""Greedy answers of several views in one pass over the weights, using drafts if there are any.

The merged model reads the adapter's answers and accepts each token that is also its own likeliest:
16 tokens, then up to 64 at a time while all are right, after a wrong one as many as were right.
Reading a token costs as much computing as writing one; only the passes are fewer. So a draft that
does not fit is not read on.

Before its batches are made, a model reads the first tokens of a question twice, once with padding
or a hole in the cache. If the next token's logits differ, each question is a batch of its own: some
thirty of transformers' models ignore masks or positions somewhere. A list of names would miss the
next one; the rule that a model must take positions would ask Bloom and Mamba alone for nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import torch

from weightsmith.forward.heads import BatchPositions, only, some_logits
from weightsmith.forward.libraries import ModelFails, running
from weightsmith.forward.memory import BATCH_BYTES, BATCH_TOKENS, token_bytes
from weightsmith.forward.pictures import ACTIVATIONS, Sight, alike, joined

if TYPE_CHECKING:
    from transformers import Cache, PretrainedConfig, PreTrainedModel

    from weightsmith.forward.kinds import Model

Tokens = Sequence[int]
Written = tuple[int, int, list[int]]
"""An answer's number, and tokens from a position on."""
Keep = Callable[[Sequence[Written]], None]
Fits = Callable[[int, int], bool]
"""(rows, the longest one's tokens) -> whether they fit into memory."""
FIRST, MOST = 16, 64
"""Tokens that are read at first, and at most: twice as many whenever all of them were right."""
_NEAR = 4
"""How far a text may have moved against its draft, in tokens, to be found in it again."""
_ROUNDS = 2
"""How often a draft is read: after two wrong tokens, another pass would confirm few more."""
_PADDING = 128
"""Padding of a batch that is only read: another batch reads and converts every weight again."""
_HIDDEN = 4096
"""Hidden size if the configuration has none at its top: that of most models of 7B."""
_LEAVE = 4
"""A batch continues without its finished answers as soon as they are one in so many."""


def read_at_once(asked: int, draft: int) -> int:
    """Return how many tokens of a text a pass reads at most, with so many of question and draft."""
    return max(asked + min(draft, FIRST), min(draft, MOST) + 1)


@dataclass(slots=True)
class Draft:
    """A probable answer, and how much of it is worth reading next.

    Reading a token costs about as much as writing one. So after a wrong one, only as many are read
    as were right the last time; if that was none, the model's own next token must fit first.
    """

    tokens: Sequence[int] = ()
    _place: int = 0
    _window: int = FIRST

    def guess(self, most: int, ends: Sequence[int]) -> list[int]:
        """Return at most so many probable next tokens, without one that ends the answer.

        That one is known from the token before it.
        """
        some = self.tokens[self._place : self._place + min(self._window, most)]
        end = next((i for i, token in enumerate(some) if token in ends), len(some))
        return list(some[:end])

    def learn(self, guessed: int, right: int, token: int) -> None:
        """Go on behind the guessed tokens that were right and the model's own next one.

        It stands for the one that was wrong. If none was right, it may be elsewhere in the draft.
        """
        expected = self._place + right
        reach = 0 if right else _NEAR
        near = range(max(0, expected - reach), min(len(self.tokens), expected + reach + 1))
        fits = [place for place in near if self.tokens[place] == token]
        self._place = min(fits, key=lambda place: abs(place - expected), default=expected) + 1
        all_right = bool(fits) and right == guessed
        self._window = min(MOST, 2 * max(1, self._window)) if all_right else right


@dataclass(slots=True)
class Answers:
    """One view's tokens after each prompt."""

    tokens: list[list[int]]
    margins: list[list[float]]
    """Of each token, the nats by which it was likelier than the second likeliest."""

    def append(
        self, number: int, tokens: Tokens, margins: Sequence[float], asked: Questions
    ) -> Written:
        """Add tokens to an answer, up to one that ends it; return what is new."""
        ends = (i for i, token in enumerate(tokens) if token in asked.ends)
        end = next(ends, len(tokens) - 1) + 1
        written = number, len(self.tokens[number]), list(tokens[:end])
        self.tokens[number] += tokens[:end]
        self.margins[number] += margins[:end]
        del self.tokens[number][asked.most :], self.margins[number][asked.most :]
        return written


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
    sights: Mapping[int, Sight] = field(default_factory=dict)
    """Prompt's number -> what the processor made of its pictures."""

    def batches(
        self, rows: Mapping[int, Tokens], fits: Fits, padding: int | None = None
    ) -> Iterator[list[int]]:
        """Yield batches, as the function does; pictures that cannot be joined are apart."""
        if not self.sights:
            yield from batches(rows, fits, padding)
            return
        room = self.batch_bytes // ACTIVATIONS
        for some in alike(rows, self.sights):
            largest = max((self.sights[n].size for n in some if n in self.sights), default=0)
            most = max(1, room // max(1, largest))
            yield from batches(some, partial(_both_fit, most, fits), padding)

    def seen(
        self, model: Model, batch: Sequence[int], rows: Sequence[Tokens], *, left: bool
    ) -> dict[str, torch.Tensor]:
        """Return what the model is called with for the pictures of a batch, padded to its rows."""
        if batch[0] not in self.sights:
            return {}
        lengths = [len(row) for row in rows]
        found = joined([self.sights[n] for n in batch], lengths, max(lengths), left=left)
        return {name: data for name, data in found.items() if takes(model, name)}


@torch.inference_mode()
def greedy(model: Model, asked: Questions, advance: Callable[[int], None]) -> Answers:
    """Return the most likely tokens after each prompt, including the token that ends an answer.

    A draft's tokens are read some at a time and accepted up to the first that is not the most
    likely one, which is replaced. `advance` is called with the number of finished answers.
    """
    numbers = range(len(asked.prompts))
    answers = Answers([[] for _ in numbers], [[] for _ in numbers])
    empty = empty_prefix(model, asked.prompts, asked.most)
    alone = batches_change(model, empty, asked.prompts, asked.filler)
    apart = alone or bool(asked.sights)
    shared = Prefix() if apart else shared_prefix(model, asked.prompts, empty)
    drafts = {} if alone else _usable_drafts(model, asked)
    if not shared.layers:
        _read_drafts(model, asked, answers, drafts)
    left = [n for n in numbers if not _ended(answers.tokens[n], asked)]
    advance(len(numbers) - len(left))
    rows = {n: [*asked.prompts[n], *answers.tokens[n]] for n in left}
    fits = (lambda count, _: count == 1) if alone else _fits(model, asked, shared, drafts)
    for batch in asked.batches(rows, fits):
        if shared.layers:
            texts = {n: Draft(drafts.get(n, ())) for n in batch}
            _continue(model, asked, shared, texts, answers)
        else:
            _generate(model, asked, batch, answers)
        advance(len(batch))
    return answers


def _usable_drafts(model: Model, asked: Questions) -> dict[int, list[int]]:
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


def _both_fit(most: int, fits: Fits, rows: int, longest: int) -> bool:
    return rows <= most and fits(rows, longest)


def batch_tokens(model: Model, asked: Questions) -> int:
    """Return how many tokens of prompts and answers a batch may have."""
    return min(BATCH_TOKENS, asked.batch_bytes // token_bytes(**_sizes(model)))


def _fits(model: Model, asked: Questions, shared: Prefix, drafts: Mapping[int, Tokens]) -> Fits:
    """Return whether a batch of so many rows, the longest of so many tokens, fits into memory.

    With a cache, all tokens have keys and values, but only those of one pass have activations.
    """
    most = batch_tokens(model, asked)
    if not shared.layers:
        return lambda count, longest: count * (longest + asked.most) <= most
    sizes = _sizes(model)
    whole = token_bytes(**sizes)
    kept = token_bytes(**{**sizes, "hidden": 0, "intermediate": 0})
    drafted = max(map(len, drafts.values()), default=0)

    def fits(count: int, longest: int) -> bool:
        tokens = count * (longest + asked.most)
        passing = count * read_at_once(longest - shared.length, drafted)
        needed = tokens * kept + passing * (whole - kept)
        return tokens <= BATCH_TOKENS and needed <= asked.batch_bytes

    return fits


def _sizes(model: Model) -> dict[str, int]:
    config = model.config.get_text_config()
    heads = _size(config, "num_attention_heads") or 1
    hidden = _size(config, "hidden_size") or _HIDDEN
    width = _size(config, "head_dim") or hidden // heads
    return {
        "layers": _size(config, "num_hidden_layers") or 1,
        "cached": (_size(config, "num_key_value_heads") or heads) * width,
        "hidden": hidden,
        "intermediate": _size(config, "intermediate_size") or 4 * hidden,
    }


def _size(config: PretrainedConfig, name: str) -> int:
    """Return a size, the largest if each layer has its own; 0 if there is none for all layers."""
    try:
        value = getattr(config, name)
    except (AttributeError, RuntimeError):  # transformers raises RuntimeError for mixed layers
        return 0
    sizes = value if isinstance(value, list | tuple) else [value]
    return max((size for size in sizes if isinstance(size, int)), default=0)


def batches(
    rows: Mapping[int, Tokens], fits: Fits, padding: int | None = None
) -> Iterator[list[int]]:
    """Yield batches of row numbers of similar length, to keep padding small.

    A batch `fits` by its number of rows and the longest row's length, and has at most `padding`
    tokens without meaning.
    """
    batch: list[int] = []
    tokens = 0
    for number in sorted(rows, key=lambda n: (len(rows[n]), n)):
        count, longest = len(batch) + 1, len(rows[number])
        tokens += longest
        wide = padding is not None and count * longest - tokens > padding
        if batch and (wide or not fits(count, longest)):
            yield batch
            batch, tokens = [], longest
        batch.append(number)
    if batch:
        yield batch


def _ended(tokens: Tokens, asked: Questions) -> bool:
    return len(tokens) >= asked.most or bool(tokens and tokens[-1] in asked.ends)


def _continue(
    model: Model,
    asked: Questions,
    shared: Prefix,
    drafts: Mapping[int, Draft],
    found: Answers,
) -> None:
    longest = max(len(asked.prompts[n]) for n in drafts)
    keys = shared.rows(len(drafts), longest + asked.most + HOLES - shared.length)
    batch = list(drafts)
    new = {n: list(asked.prompts[n][shared.length :]) for n in batch}
    while going := [n for n in batch if not _ended(found.tokens[n], asked)]:
        if keys.holes > HOLES or _LEAVE * (len(batch) - len(going)) >= len(batch):
            keys.select([row for row, n in enumerate(batch) if n in going])
            batch = going
        left = {n: asked.most - len(found.tokens[n]) - 1 for n in going}
        guesses = {n: drafts[n].guess(left[n], asked.ends) for n in going}
        rows = [[*new[n], *guesses[n]] if n in going else [] for n in batch]
        counts = [len(guesses[n]) + 1 if n in going else 0 for n in batch]
        read = _read(model, rows, counts, asked.filler, keys)
        right, written = [], []
        for number, row, (tokens, margins) in zip(batch, rows, read, strict=True):
            guess = guesses.get(number, [])
            same = next((i for i, t in enumerate(guess) if tokens[i] != t), len(guess))
            right.append(len(row) - len(guess) + same)
            if tokens:
                written.append(found.append(number, tokens[: same + 1], margins, asked))
                drafts[number].learn(len(guess), same, tokens[same])
                new[number] = [tokens[same]]
        asked.keep(written)
        keys.keep(torch.tensor(right), max(map(len, rows)))


def _read_drafts(
    model: Model, asked: Questions, found: Answers, drafts: Mapping[int, Tokens]
) -> None:
    """Check drafts, each as a whole, by a model without keys and values of single tokens."""
    rest, most = dict(drafts), batch_tokens(model, asked)
    for _ in range(_ROUNDS):
        rows = {n: [*asked.prompts[n], *found.tokens[n], *rest[n]] for n in rest}
        for batch in asked.batches(rows, lambda count, longest: count * longest <= most, _PADDING):
            counts, texts = [len(rest[n]) + 1 for n in batch], [rows[n] for n in batch]
            pictures = asked.seen(model, batch, texts, left=False)
            read = _read(model, texts, counts, asked.filler, pictures=pictures)
            for number, (tokens, margins) in zip(batch, read, strict=True):
                draft = rest[number]
                same = next((i for i, t in enumerate(draft) if tokens[i] != t), len(draft))
                asked.keep([found.append(number, tokens[: same + 1], margins, asked)])
                rest[number] = draft[same + 1 :]
        rest = {
            n: draft for n, draft in rest.items() if draft and not _ended(found.tokens[n], asked)
        }


def _read(
    model: Model,
    rows: Sequence[Tokens],
    counts: Sequence[int],
    filler: int,
    keys: Cache = None,
    pictures: Mapping[str, torch.Tensor] = {},
) -> list[tuple[list[int], list[float]]]:
    """Return the most likely token after each of a row's last tokens, so many per row, and margins.

    The rows continue those in `keys`. They are padded on the right, which causal models ignore.
    """
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[filler] * (width - len(row))] for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    columns = torch.arange(width)
    tokens = columns < lengths[:, None]
    wanted = tokens & (columns >= (lengths - torch.tensor(counts))[:, None])
    asked_at = wanted.flatten().nonzero()[:, 0]
    positions = BatchPositions(len(rows), width, tokens.flatten().nonzero()[:, 0], asked_at)
    given: dict[str, Any] = {"use_cache": False, **pictures}
    if keys is not None:
        given = keys.given(lengths, width)
        keys.narrow(positions)
    # A batch of pictures may look like one of texts.
    with nullcontext() if pictures else only(positions):
        parts = some_logits(model, ids, (asked_at // width, asked_at % width), **given)
        found = [_best(part) for part in parts]
    both = (torch.cat(each) for each in zip(*found, strict=True))
    best, margins = (torch.split(each, list(counts)) for each in both)
    return [(a.tolist(), b.tolist()) for a, b in zip(best, margins, strict=True)]


def _best(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each row's most likely token, and by how much it exceeds the second one.

    Two maxima are found in a fraction of the time that topk takes. The second is looked for without
    a copy of the logits, which are most of the memory: the first is put back afterwards.
    """
    best = torch.argmax(logits, -1, keepdim=True)
    highest = logits.gather(-1, best)
    others = logits.scatter_(-1, best, -torch.inf).amax(-1)
    logits.scatter_(-1, best, highest)
    return best[..., 0], highest[..., 0] - others


def _generate(model: Model, asked: Questions, batch: Sequence[int], found: Answers) -> None:
    """Continue a batch until all of its answers have ended, by the model's own kind of cache.

    It is padded on the left; padding is masked and positions count without it.
    """
    from transformers import GenerationConfig, LogitsProcessorList

    rows = [[*asked.prompts[n], *found.tokens[n]] for n in batch]
    width = max(1, *map(len, rows))
    ids = torch.tensor([[*[asked.filler] * (width - len(row)), *row] for row in rows])
    mask = torch.tensor([[*[0] * (width - len(row)), *[1] * len(row)] for row in rows])
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
        max_new_tokens=asked.most - min(len(found.tokens[n]) for n in batch),
        pad_token_id=asked.filler,
        eos_token_id=list(asked.ends) or None,
    )
    model.generation_config = settings
    with running():
        made = model.generate(
            input_ids=ids,
            attention_mask=mask,
            **asked.seen(model, batch, rows, left=True),
            generation_config=settings,
            logits_processor=LogitsProcessorList([record]),
        )
    gaps = torch.stack(margins, 1).tolist() if margins else [[] for _ in batch]
    for number, row, gap in zip(batch, made[:, width:].tolist(), gaps, strict=True):
        asked.keep([found.append(number, row, gap, asked)])


_TOKENS = 4
"""Of a text that is read twice: for so few, this costs two or three passes over the weights."""
_ALIKE = 1e-3
"""Of the largest logit: sums in another order differ by a hundredth of that."""


def batches_change(model: Model, empty: Prefix, prompts: Sequence[Sequence[int]], pad: int) -> bool:
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
        if empty.layers:  # a hole: a column before the last token is taken back
            keys, width = empty.rows(1, len(text) + 1), len(text)
            _last(model, [*text[:-1], pad], **keys.given(torch.tensor([width]), width))
            keys.keep(torch.tensor([width - 1]), width)
            other = _last(model, text[-1:], **keys.given(torch.tensor([1]), 1))
        else:  # padding before it, which is masked, and behind it
            mask = torch.tensor([[0, *[1] * (len(text) + 1)]])
            given: dict[str, Any] = {"attention_mask": mask, "use_cache": True}
            if takes(model, "position_ids"):
                given["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
            other = _last(model, [pad, *text, pad], place=-2, **given)
    except ModelFails:  # its cache is of another kind
        return True
    return bool((alone - other).abs().max() > _ALIKE * alone.abs().max())


@running()
def _last(
    model: Model, ids: Sequence[int], place: int = -1, **given: torch.Tensor | bool
) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=torch.tensor([list(ids)]), **given).logits
    return logits[0, place].float()


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

    def rows(self, count: int, more: int) -> Cache:
        """Return the `Keys` of so many rows that begin so, with room for more tokens."""
        from weightsmith.forward.keys import Keys

        keys = Keys(self.layers, count, self.length + more, positioned=self.positioned)
        for layer, *states in self.states:
            keys.cache.update(*(one.expand(count, *one.shape[1:]) for one in states), layer)
        keys.keep(torch.full((count,), self.length), self.length)
        return keys


def empty_prefix(model: Model, prompts: Sequence[Sequence[int]], most: int) -> Prefix:
    """Return a prefix without tokens; it has no layers if the model's cache is of another kind.

    `most` is how many tokens may follow a prompt.
    """
    columns = max(map(len, prompts), default=0) + most + HOLES + min(most, MOST)
    return Prefix(layers=_plain_layers(model, columns), positioned=takes(model, "position_ids"))


def shared_prefix(model: Model, prompts: Sequence[Sequence[int]], empty: Prefix) -> Prefix:
    """Return the tokens that all prompts begin with, read in one pass; none if it saves too little.

    At least one token of each prompt is left. `empty` is the model's prefix without tokens.
    """
    first, last = min(prompts, key=list, default=()), max(prompts, key=list, default=())
    longest = min(map(len, prompts), default=1) - 1  # without any prompt's last token
    same = (n for n, (a, b) in enumerate(zip(first, last, strict=False)) if a != b)
    length = max(0, min(longest, next(same, longest)))
    if not empty.layers or length * (len(prompts) - 1) < _WORTH:
        return empty
    cache = empty.rows(1, length).cache
    ids = torch.tensor([prompts[0][:length]])
    # One logit is enough: the head of a small model is a fifth of its weights.
    with running():
        model(input_ids=ids, cache=cache, use_cache=True, logits_to_keep=1)
    kept = [(n, one.keys, one.values) for n, one in enumerate(cache.layers) if one.is_initialized]
    return replace(empty, length=length, states=tuple(kept))


def depends_on_length(model: Model) -> bool:
    """Return whether the model's positions depend on the length of the whole text."""
    settings = str(model.config.get_text_config().to_dict())
    return any(kind in settings for kind in _LENGTH_DEPENDENT)


def _plain_layers(model: Model, columns: int) -> int:
    """Return how many layers of keys and values of every token the model's cache has.

    0 for models with other states, and for windows that may be shorter than so many columns.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    own = bare(model)
    # From transformers 5.25 on, the types of a cache's layers alone tell of other states.
    if not takes(model, "cache") or getattr(own, "_is_stateful", False) or depends_on_length(own):
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


def bare(model: Model) -> PreTrainedModel:
    """Return transformers' model without PEFT's around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def takes(model: Model, name: str) -> bool:
    """Return whether a model is called with an argument of this name."""
    return name in inspect.signature(bare(model).forward).parameters
