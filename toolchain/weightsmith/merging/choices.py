"""Log-likelihoods of an item's choices: base, or base with unmerged adapters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from weightsmith.jobs import Question
from weightsmith.merging.reference import (
    Message,
    Progress,
    load_network,
    load_tokenizer,
    modest_threads,
    prompt_tokens,
    stay_offline,
)


def likelihoods(
    model: Path,
    adapters: Sequence[tuple[Path, float]],
    items: Sequence[Question],
    progress: Progress | None = None,
) -> list[list[float]]:
    """Return each choice's log-likelihood (natural logarithm, float32 forward), item by item.

    A choice continues a plain question's single message as text, after a space, without a chat
    template. The sum is over the tokens that the choice adds to the context. Raises InputRefused
    as `reference.answer` does.
    """
    stay_offline()
    with modest_threads():
        tokenizer = load_tokenizer(model, adapters)
        network = load_network(model, adapters)
        found = []
        for number, item in enumerate(items, start=1):
            pairs = [_tokens(tokenizer, item, choice, model) for choice in item.choices]
            found.append([_score(network, whole, shared) for whole, shared in pairs])
            if progress is not None:
                progress(number, len(items))
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
