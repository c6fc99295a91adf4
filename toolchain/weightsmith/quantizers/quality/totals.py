"""Totals of a comparison over texts, with intervals by resampling whole texts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

_TIE = 0.1
"""Nats within which two next tokens count as tied: rounding decides between them without a loss.
A weak model has many such ties."""
_RESAMPLES = 1000
_TAIL = 0.025
"""Of a two-sided 95 % interval."""
_FEWEST = 4
"""Texts below which resampling says nothing."""


@dataclass(slots=True)
class Totals:
    """Both models' differences at each predicted token, and the text that it is from."""

    texts: list[torch.Tensor] = field(default_factory=list)
    divergences: list[torch.Tensor] = field(default_factory=list)
    agreements: list[torch.Tensor] = field(default_factory=list)
    before: list[torch.Tensor] = field(default_factory=list)
    after: list[torch.Tensor] = field(default_factory=list)

    def add(
        self, right: torch.Tensor, other: torch.Tensor, following: torch.Tensor, texts: torch.Tensor
    ) -> None:
        """Add both models' log probabilities [positions, vocabulary].

        `following` has the actual next tokens, `texts` the number of each position's text.
        """
        self.texts.append(texts)
        self.divergences.append((right.exp() * (right - other)).sum(-1).clamp(min=0))
        picked = right.gather(1, other.argmax(-1, keepdim=True))[:, 0]
        self.agreements.append((right.amax(-1) - picked <= _TIE).float())
        self.before.append(-right.gather(1, following[:, None])[:, 0])
        self.after.append(-other.gather(1, following[:, None])[:, 0])

    def result(self) -> dict[str, Any]:
        """Return means and quantiles over all tokens, and `intervals` of those that are judged."""
        divergence = torch.cat(self.divergences)
        agree, before, after = map(torch.cat, (self.agreements, self.before, self.after))
        return {
            "kl_mean": short(float(divergence.mean())),
            "kl_p99": short(float(divergence.quantile(0.99))),
            "top1": short(float(agree.mean())),
            "perplexity": short(_exp(float(after.mean()))),
            "perplexity_reference": short(_exp(float(before.mean()))),
            "perplexity_ratio": short(_exp(float((after - before).mean()))),
            "intervals": _intervals(torch.cat(self.texts), divergence, agree, after - before),
        }


def _intervals(
    texts: torch.Tensor, divergence: torch.Tensor, agree: torch.Tensor, lost: torch.Tensor
) -> Mapping[str, tuple[float, float]]:
    """Return 95 % percentile intervals, from resamples of whole texts with a fixed seed.

    Tokens of one text are not independent, texts are. Efron, "Bootstrap methods: another look at
    the jackknife", 1979. Returns {} for fewer than four texts.
    """
    names, place = torch.unique(texts, return_inverse=True)
    if len(names) < _FEWEST:
        return {}
    chance = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(names), (_RESAMPLES, len(names)), generator=chance)
    counts = torch.zeros(_RESAMPLES, len(names)).scatter_add_(1, drawn, torch.ones(drawn.shape))
    weights = counts[:, place]
    total = weights.sum(1)
    order = divergence.argsort()
    reached = weights[:, order].cumsum(1) >= 0.99 * total[:, None]
    found = {
        "kl_mean": weights @ divergence / total,
        "kl_p99": divergence[order][reached.int().argmax(1)],
        "top1": weights @ agree / total,
        "perplexity_ratio": (weights @ lost / total).clamp(max=700).exp(),
    }
    ends = torch.tensor([_TAIL, 1 - _TAIL])
    return {
        name: (short(float(low)), short(float(high)))
        for name, values in found.items()
        for low, high in [values.double().quantile(ends.double())]
    }


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0))


def short(value: float) -> float:
    """Round to six digits, more than two machines agree on."""
    return float(f"{value:.6g}")
