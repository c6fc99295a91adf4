"""Log-likelihoods of an item's choices: base, or base with unmerged adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from weightsmith.forward.meeting import Meeting
from weightsmith.forward.walk import Count, Progress, walk
from weightsmith.jobs import Question
from weightsmith.merging.reference import (
    Message,
    Subject,
    prompt_tokens,
    speaker,
    stay_offline,
)


def likelihoods(
    subjects: Mapping[str, Subject], items: Sequence[Question], progress: Progress | None = None
) -> dict[str, list[list[float]]]:
    """Return each choice's log-likelihood (natural logarithm, float32 forward), item by item.

    A choice continues a plain question's single message as text, after a space, without a chat
    template. The sum is over the tokens that the choice adds to the context. Raises InputRefused
    as `reference.answers` does.
    """
    stay_offline()
    count = Count(len(items) * len(subjects), progress)
    ask = {name: partial(_scores, _pairs(one, items), count) for name, one in subjects.items()}
    return walk(subjects, ask)


def _pairs(subject: Subject, items: Sequence[Question]) -> list[list[tuple[list[int], int]]]:
    tokenizer = speaker(subject)
    return [
        [_tokens(tokenizer, item, choice, subject.model) for choice in item.choices]
        for item in items
    ]


def _scores(
    items: Sequence[Sequence[tuple[list[int], int]]], count: Count, network: Any, _: Meeting
) -> list[list[float]]:
    found = []
    for pairs in items:
        found.append([_score(network, whole, shared) for whole, shared in pairs])
        count(1)
    return found


def _tokens(tokenizer: Any, item: Question, choice: str, model: Path) -> tuple[list[int], int]:
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
def _score(network: Any, tokens: Sequence[int], shared: int) -> float:
    logits = network(input_ids=torch.tensor([tokens])).logits[0]
    scores = torch.log_softmax(logits[shared - 1 : -1].double(), dim=-1)
    targets = torch.tensor(tokens[shared:])
    return float(scores.gather(1, targets[:, None]).sum())
