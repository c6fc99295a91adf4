"""What a walk over a model's weights takes: memory, from its dimensions, and measured time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from weightsmith.core.errors import InputRefused
from weightsmith.core.json_objects import JsonObject
from weightsmith.models.facts import ModelFacts
from weightsmith.models.shape import ModelShape

BATCH_TOKENS = 4096
"""Tokens that one view reads at a time: enough to share each weight, few enough for memory."""
BATCH_BYTES = 512 << 20
"""For one view's batch, if nothing else is planned."""
LOGIT_BYTES = 64 << 20
"""For the logits of one view's positions that are computed at a time."""
_LEAST, _MOST = 256 << 20, 4 << 30
"""For the batches of all views: less would read the weights too often, more saves few readings."""
VIEWS = 64
"""Most models in one walk, each of which has a thread."""
START = 380 << 20
"""Python, torch, transformers and PEFT, 304 MiB of it by imports, and the tokenizer."""
_FEW, _MODULES = 3, 320 << 10
"""How many models' modules START has, and the bytes of a layer's in a further one: 290 KiB of them
were measured."""
UNKNOWN = 3 << 30
"""For models whose dimensions are not known."""
COMPARING = 256 << 20
"""For two models' logits, and tensors that are compared element by element."""
DEQUANTIZED = 384 << 20
"""What stays of the last dequantized matrix, and the rows that all threads dequantize."""
_FLOAT = 4
_STREAMS = 8
"""Vectors of the hidden size that a layer holds per token: input, residual, norms, queries, keys,
values, attention's output and the product that is added."""
_GATES = 3
"""Vectors of the feed-forward size: both gates and their product."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WalkSize:
    """What runs side by side over one model's weights, which stay in their files."""

    views: int
    """Models, such as the base and the base with its adapters."""
    rows: int
    """Texts of each view."""
    tokens: int
    """Tokens of all texts of one view, with their answers."""
    adapter_bytes: int = 0
    """The adapters' weights in float32, which stay in memory."""


def joint_walk(one: WalkSize, other: WalkSize) -> WalkSize:
    """Return both in one walk, as if all texts were as many and as long as the larger one's."""
    return WalkSize(
        views=one.views + other.views,
        rows=max(one.rows, other.rows),
        tokens=max(one.tokens, other.tokens),
        adapter_bytes=one.adapter_bytes + other.adapter_bytes,
    )


def token_bytes(*, layers: int, cached: int, hidden: int, intermediate: int) -> int:
    """Return what a token of a batch takes: keys and values in float32, a layer's activations.

    `cached` is the width of a layer's keys.
    """
    return _FLOAT * (2 * layers * cached + _STREAMS * hidden + _GATES * intermediate)


def shape_token_bytes(shape: ModelShape) -> int:
    """Return `token_bytes` of a model."""
    return token_bytes(
        layers=shape.layers,
        cached=shape.kv_heads * shape.head_dim,
        hidden=shape.hidden,
        intermediate=shape.intermediate,
    )


def all_at_once(shape: ModelShape, walk: WalkSize, budget: int) -> bool:
    """Return whether a walk's models read all of their texts at once, in half of a budget.

    The other half is for a job beside it.
    """
    half = budget // 2
    whole = batch_bytes(shape, walk, half) == _wanted(shape, walk)
    fits = not half or walk_bytes(shape, walk, half) <= half
    return whole and fits and walk.views <= VIEWS


def _wanted(shape: ModelShape, walk: WalkSize) -> int:
    return walk.views * min(walk.tokens, BATCH_TOKENS) * shape_token_bytes(shape)


def batch_bytes(shape: ModelShape, walk: WalkSize, budget: int) -> int:
    """Return how much of a budget the batches of all views together may fill.

    If that is too little for all texts, they are read in several batches.
    """
    wanted = _wanted(shape, walk)
    # Of each layer's keys and values, one layer's are held twice more: see `walk_bytes`.
    layers = max(1, shape.layers)
    # A 25th of the budget is for what no plan knows.
    left = (budget * 24 // 25 - _fixed(shape, walk)) * layers // (layers + 2)
    left = left if budget else BATCH_BYTES * walk.views
    return max(min(_LEAST, wanted), min(wanted, left, _MOST))


def walk_bytes(shape: ModelShape, walk: WalkSize, budget: int) -> int:
    """Return the peak of anonymous memory of a walk in bytes; 0 for a budget that is not known.

    The sum of libraries, adapters, batches (and one layer's keys and values once more, while they
    grow) and logits. Measured for 33, 8 and 8 questions to base, adapter and merged model of 0.13,
    0.5 and 1.07 billion weights: 0.74, 0.44 and 0.51 GiB; the sums are 1.02, 0.73 and 0.79.
    """
    batch = batch_bytes(shape, walk, budget)
    return _fixed(shape, walk) + batch + 2 * batch // max(1, shape.layers)


def single_pass_bytes(shape: ModelShape, walk: WalkSize) -> int:
    """Return the peak of a walk that reads all texts at once and keeps no keys and values."""
    one = token_bytes(layers=0, cached=0, hidden=shape.hidden, intermediate=shape.intermediate)
    return _fixed(shape, walk) + walk.views * walk.tokens * one


def model_walk_bytes(model: ModelFacts, walk: WalkSize, budget: int) -> int:
    """Return `walk_bytes` of a model; UNKNOWN if its dimensions are not known."""
    try:
        return walk_bytes(model.shape, walk, budget)
    except InputRefused:
        return UNKNOWN


def model_pass_bytes(model: ModelFacts, walk: WalkSize) -> int:
    """Return `single_pass_bytes` of a model; UNKNOWN if its dimensions are not known."""
    try:
        return single_pass_bytes(model.shape, walk)
    except InputRefused:
        return UNKNOWN


def _fixed(shape: ModelShape, walk: WalkSize) -> int:
    # A generated token's logits are copied three times by transformers.
    rows = min(walk.rows, BATCH_TOKENS * walk.rows // max(1, walk.tokens))
    logits = max(3 * LOGIT_BYTES, 4 * _FLOAT * walk.views * rows * shape.vocab)
    # Each model's tokens, of which one was counted where there are few models.
    logits = min(logits, 12 * walk.tokens * shape.vocab * max(1, walk.views - _FEW + 1))
    modules = max(0, walk.views - _FEW) * shape.layers * _MODULES
    return START + walk.adapter_bytes + logits + modules


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTime(JsonObject):
    """Seconds of one decoder layer and of the head, for two counts of tokens."""

    layers: int
    counts: tuple[int, ...]
    layer: tuple[float, ...]
    head: tuple[float, ...]

    def passed(self, tokens: float, positions: float) -> float:
        """Return the seconds of a pass over all layers, with logits at some positions."""
        return self.layers * self._at(self.layer, tokens) + self._at(self.head, positions)

    def _at(self, seconds: Sequence[float], tokens: float) -> float:
        few, many = self.counts
        slope = max(0.0, (seconds[1] - seconds[0]) / (many - few))
        return max(0.0, seconds[0] - slope * few) + slope * tokens
