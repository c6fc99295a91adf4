"""Log-likelihoods of an item's choices: base, or base with unmerged adapters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from weightsmith.core.jobs import Question
from weightsmith.forward.heads import some_logits
from weightsmith.forward.libraries import stay_offline
from weightsmith.forward.lockstep import Lockstep
from weightsmith.forward.walk import walk
from weightsmith.merging.reference import (
    Message,
    UnmergedModel,
    Voice,
    prompt_tokens,
    speaker,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from weightsmith.forward.kinds import Model

Asked = tuple[UnmergedModel, Sequence[Question]]
"""A subject, and what it is asked."""


def likelihoods(
    subjects: Mapping[str, Asked],
    count: Callable[[int], None] = lambda _: None,
    finished: Callable[[str, list[list[float]]], None] = lambda *_: None,
) -> dict[str, list[list[float]]]:
    """Return each choice's log-likelihood (natural logarithm, float32 forward), item by item.

    A choice continues a plain question's single message as text, after a space, without a chat
    template. The sum is over the tokens that the choice adds to the context. `count` and `finished`
    are called as by `reference.answered`, which also says what it raises.
    """
    stay_offline()
    loaded = dict[Voice, Any]()
    ask = {
        name: partial(_scores, _pairs(*one, loaded), count, partial(finished, name))
        for name, one in subjects.items()
    }
    return walk({name: subject for name, (subject, _) in subjects.items()}, ask)


def _pairs(
    subject: UnmergedModel, items: Sequence[Question], loaded: dict[Voice, PreTrainedTokenizerBase]
) -> list[list[tuple[list[int], int]]]:
    tokenizer = speaker(subject, loaded)
    return [
        [_tokens(tokenizer, item, choice, subject.model) for choice in item.choices]
        for item in items
    ]


def _scores(
    items: Sequence[Sequence[tuple[list[int], int]]],
    count: Callable[[int], None],
    finished: Callable[[list[list[float]]], None],
    network: Model,
    lockstep: Lockstep,
) -> list[list[float]]:
    found = []
    for pairs in items:
        found.append([_score(network, whole, shared) for whole, shared in pairs])
        count(1)
    with lockstep.away():
        finished(found)
    return found


def _tokens(
    tokenizer: PreTrainedTokenizerBase, item: Question, choice: str, model: Path
) -> tuple[list[int], int]:
    """Return the token ids of context plus choice, and the number of context tokens among them."""
    messages: Sequence[Message] = item.messages
    if item.plain:
        context = messages[0]["content"]
        apart = context[-1:].isspace() or choice[:1].isspace()
        before = list(tokenizer(context)["input_ids"])
        whole = list(tokenizer(context + ("" if apart else " ") + choice)["input_ids"])
    else:
        before = prompt_tokens(tokenizer, messages, model)
        whole = before + list(tokenizer(choice, add_special_tokens=False)["input_ids"])
    shared = next(
        (n for n, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b),
        min(len(before), len(whole)),
    )
    return whole, max(1, shared)


@torch.inference_mode()
def _score(network: Model, tokens: Sequence[int], shared: int) -> float:
    """Return the log-likelihood of the tokens after the first `shared` ones."""
    columns = torch.arange(shared - 1, len(tokens) - 1)
    places = (torch.zeros_like(columns), columns)
    parts = some_logits(network, torch.tensor([tokens]), places, use_cache=False)
    rows = (row for part in parts for row in part)
    # Row by row: in float64, all of them can be many times the model's activations.
    scores = [
        torch.log_softmax(row.double(), dim=-1)[token]
        for row, token in zip(rows, tokens[shared:], strict=True)
    ]
    return float(torch.stack(scores).sum()) if scores else 0.0
