"""Products and logits of those positions of a batch alone that something depends on.

Logits are computed for some positions at a time: those of a whole batch can be most of the memory.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from weightsmith.forward.libraries import running
from weightsmith.forward.memory import LOGIT_BYTES
from weightsmith.forward.network import decoder_of

if TYPE_CHECKING:
    from weightsmith.forward.kinds import Model

Places = tuple[torch.Tensor, torch.Tensor]
"""Rows and columns of a batch."""
_SCALES = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")
"""Settings by which a model changes its head's logits, and so their margins."""
_here = threading.local()


@dataclass(slots=True)
class BatchPositions:
    """Positions of a batch, numbered row by row, and which of them a model is asked for."""

    rows: int
    columns: int
    tokens: torch.Tensor
    """Those with a token; the others are padding."""
    wanted: torch.Tensor
    """Those that get logits."""

    def narrow(self) -> None:
        """Leave out all but those that get logits: no later position looks at others any more."""
        self.tokens = self.wanted


@contextmanager
def only(positions: BatchPositions) -> Iterator[None]:
    """Multiply only these positions, in this thread."""
    _here.positions = positions
    try:
        yield
    finally:
        _here.positions = None


def multiplied(
    inputs: torch.Tensor, multiply: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Return the product of inputs [..., columns]; zeros where nothing depends on it."""
    known: BatchPositions | None = getattr(_here, "positions", None)
    if known is None or inputs.shape[:-1] != (known.rows, known.columns):
        return multiply(inputs)
    count = known.rows * known.columns
    if len(known.tokens) == count:
        return multiply(inputs)
    some = multiply(inputs.reshape(count, -1)[known.tokens])
    product = some.new_zeros((count, some.shape[-1]))
    product[known.tokens] = some
    return product.view(known.rows, known.columns, -1)


def some_logits(
    model: Model, ids: torch.Tensor, places: Places, **more: torch.Tensor | bool
) -> Iterator[torch.Tensor]:
    """Yield a model's logits at some places of a batch, [positions, vocabulary], in order.

    `ids` are [rows, columns]; `more` goes to the model with them.
    """
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    step = max(1, LOGIT_BYTES // (4 * config.vocab_size))
    scaled = any(getattr(config, name, None) for name in _SCALES)
    parts: list[torch.Tensor] = []
    outputs: list[Any] = []

    def select(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        parts.extend(torch.split(args[0][places], step))
        return (parts[0][None], *args[1:])

    def record(_: torch.nn.Module, __: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        outputs.append(type(output))

    hooks = [head.register_forward_pre_hook(select)]
    if scaled:
        hooks.append(decoder_of(model).register_forward_hook(record))
    try:
        with running():
            first = model(input_ids=ids, **more).logits[0]
    finally:
        for hook in hooks:
            hook.remove()
    yield first
    for part in parts[1:]:
        yield logits_of(model, outputs[0], part) if scaled else head(part[None])[0]


def logits_of(model: Model, output: type, states: torch.Tensor) -> torch.Tensor:
    """Return the logits of a decoder's states [positions, hidden], by the model's own scaling.

    `output` is the type that the decoder returns.
    """
    decoder = decoder_of(model)
    own = decoder.forward
    decoder.forward = lambda *_, **__: output(last_hidden_state=states[None])
    try:
        ids = torch.zeros((1, len(states)), dtype=torch.long)
        with running():
            found: torch.Tensor = model(input_ids=ids, use_cache=False).logits[0]
    finally:
        decoder.forward = own
    return found
