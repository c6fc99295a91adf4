"""Greedy text: how the merged checkpoint goes on after each probe, and whether the reference does.

Only one side generates. The other reads the same tokens in its one forward, and would have
written them too exactly where its likeliest token is the next one everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from weightsmith.validating.findings import ERROR, NOTE, Finding, finding
from weightsmith.validating.forwards import Batch
from weightsmith.validating.logits import LogitLimits
from weightsmith.validating.network import fill, load_buffers, skeleton
from weightsmith.validating.weights import Weights

MOST_NEW = 16
"""Tokens that follow a probe."""
MOST_WEIGHTS = 200_000_000
"""Weights of a model that generates in memory; a larger one would be read once for each token."""
TOO_LARGE = finding(
    NOTE,
    "logits",
    f"of each answer the first token alone is compared: a model of more than {MOST_WEIGHTS:,} "
    "weights would be read once for each further token",
)
_TAIL = 80
"""Characters of a probe that are reported."""
_ROOM = 4.0
"""Logits of a probe that was not run twice may be off by other roundings than those measured."""


def can_generate(weights: Weights) -> bool:
    """Say whether the checkpoint is small enough to be held in memory in float32."""
    return sum(math.prod(info.shape) for info in weights.infos.values()) <= MOST_WEIGHTS


@torch.no_grad()
def generate(
    root: Path, probes: Sequence[Sequence[int]], ends: Collection[int], most: int
) -> list[list[int]]:
    """Return at most `most` greedy tokens of a checkpoint after each probe, an end token included.

    The whole model is in memory meanwhile, in float32. Raises what the architecture raises where
    it cannot generate.
    """
    from transformers import GenerationConfig

    model = skeleton(root)
    weights = Weights(root, model)
    load_buffers(model, weights)
    fill(model, weights)
    width = max(len(probe) for probe in probes)
    filler = min(ends, default=0)
    rows = [[*[filler] * (width - len(probe)), *probe] for probe in probes]
    seen = [[*[0] * (width - len(probe)), *[1] * len(probe)] for probe in probes]
    # Of the model's own settings none may count: penalties and samplers are not its weights.
    model.generation_config = GenerationConfig(
        max_new_tokens=most, do_sample=False, eos_token_id=sorted(ends) or None, pad_token_id=filler
    )
    made = model.generate(torch.tensor(rows), attention_mask=torch.tensor(seen))
    return [_until_end(row[width:], ends) for row in made.tolist()]


def _until_end(tokens: Sequence[int], ends: Collection[int]) -> list[int]:
    kept: list[int] = []
    for token in tokens:
        kept.append(token)
        if token in ends:
            break
    return kept


def longer(probes: Sequence[Sequence[int]], texts: Sequence[Sequence[int]]) -> list[Sequence[int]]:
    """Return the probes with what was generated behind them, but for the last token.

    What would come after the last one was never generated.
    """
    return [[*probe, *text[:-1]] for probe, text in zip(probes, texts, strict=True)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """One greedy text, and where the reference would have gone another way."""

    probe: Sequence[int]
    tokens: tuple[int, ...]
    """Of the merged model."""
    parts: int | None = None
    """Number of the first token that the reference would not have chosen."""
    other: int = 0
    """The token that it would have chosen there."""
    margin: float = 0.0
    """By how much it would have, in its own logits."""


def read(
    reference: torch.Tensor, merged: torch.Tensor, batch: Batch, texts: Sequence[Sequence[int]]
) -> Iterator[Text]:
    """Yield each probe's greedy text, by the logits that both sides gave to it.

    Without generated tokens it is the one that follows the probe.
    """
    stops = accumulate(batch.counted)
    for row, (stop, length) in enumerate(zip(stops, batch.lengths, strict=True)):
        tokens = tuple(texts[row]) if texts else (int(merged[stop - 1].argmax()),)
        probe = batch.ids[row, : length - len(tokens) + 1].tolist()
        mine = reference[stop - len(tokens) : stop]
        chosen = mine.argmax(-1).tolist()
        place = next((i for i, token in enumerate(tokens) if chosen[i] != token), None)
        if place is None:
            yield Text(probe=probe, tokens=tokens)
        else:
            margin = float(mine[place].max() - mine[place, tokens[place]])
            yield Text(probe=probe, tokens=tokens, parts=place, other=chosen[place], margin=margin)


def described(texts: Sequence[Text], tokenizer: Any) -> list[dict[str, Any]]:
    """Return `{after, merged, reference, tokens, same}` of each text, in the tokenizer's words.

    The reference's text ends with its first token that is another.
    """
    if tokenizer is None:
        return []
    rows = []
    for text in texts:
        agreed = text.tokens if text.parts is None else (*text.tokens[: text.parts], text.other)
        rows.append(
            {
                "after": _tail(tokenizer.decode(text.probe, skip_special_tokens=True)),
                "reference": tokenizer.decode(agreed),
                "merged": tokenizer.decode(text.tokens),
                "tokens": len(text.tokens),
                "same": len(text.tokens) if text.parts is None else text.parts,
            }
        )
    return rows


def _tail(text: str) -> str:
    """Return the end of a text, from the beginning of a word."""
    flat = " ".join(text.split())
    return flat if len(flat) <= _TAIL else f"… {flat[-_TAIL:].partition(' ')[2]}"


def judge(texts: Sequence[Text], allowed: LogitLimits) -> list[Finding]:
    """Return a finding where the merged model goes on otherwise and no near tie explains it."""
    wrong = [t for t in texts if t.parts is not None and t.margin > _ROOM * allowed.max_abs]
    if not wrong:
        return []
    first = min(text.parts or 0 for text in wrong)
    return [
        finding(
            ERROR,
            "logits",
            f"{len(wrong)} of {len(texts)} greedy texts are not what base and adapter say: the "
            f"first part at token {first + 1}, by a margin of up to "
            f"{max(text.margin for text in wrong):.3g}",
        )
    ]
