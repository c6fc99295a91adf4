"""What models answer: by `generate` of transformers for each prompt alone, and in one walk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from weightsmith.forward.greedy import Answers, Questions, greedy
from weightsmith.forward.lockstep import Lockstep
from weightsmith.forward.views import view

MOST = 12
"""Tokens of an answer."""


def generated(network: Any, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return what a network of transformers, in memory, generates for each prompt."""
    rows = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        seen = torch.ones_like(ids)
        made = network.generate(
            input_ids=ids, attention_mask=seen, do_sample=False, max_new_tokens=MOST, pad_token_id=3
        )
        rows.append(made[0, len(prompt) :].tolist())
    return rows


def walked(base: Path, asked: Questions, *adapters: Sequence[tuple[Path, float]]) -> list[Answers]:
    """Return what views of a base with these adapters each answer in one walk."""
    lockstep = Lockstep(2)
    views = [view(base, some, lockstep, 0) for some in adapters]
    found = lockstep.run(
        {str(n): lambda m=m: greedy(m, asked, lambda _: None) for n, m in enumerate(views)}
    )
    return [found[str(number)] for number in range(len(views))]


def logits(network: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return a network's logits in one pass."""
    with torch.inference_mode():
        found: torch.Tensor = network(input_ids=ids, use_cache=False).logits.float()
        return found
