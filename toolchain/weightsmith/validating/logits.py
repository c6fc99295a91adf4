"""Compare logits of the reference, the exact merge (rounded once), and the merged checkpoint."""

from __future__ import annotations

import torch

from weightsmith.validating.findings import ERROR, Finding, finding
from weightsmith.validating.result import Distance, LogitLimits

_FLOOR = 2.0**-14
"""Relative error of float32 logits, from sums in another order."""
_INCOMPLETE_FACTOR = 4.0
"""Factor on the limits if the exact rounding of some layers was not computed."""


def distance(reference: torch.Tensor, other: torch.Tensor) -> Distance:
    """Compare logits of shape (positions, vocabulary), row by row in float64."""
    largest = total = squares = 0.0
    divergences, same = [], 0
    for mine, theirs in zip(reference, other, strict=True):
        p, q = mine.double(), theirs.double()
        off = (p - q).abs()
        largest = max(largest, float(off.max()))
        total, squares = total + float(off.sum()), squares + float(off.square().sum())
        log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
        divergences.append(max(0.0, float((log_p.exp() * (log_p - log_q)).sum())))
        same += int(mine.argmax()) == int(theirs.argmax())
    count = max(1, reference.numel())
    return Distance(
        max_abs=largest,
        mean_abs=total / count,
        rms=(squares / count) ** 0.5,
        kl_mean=sum(divergences) / max(1, len(divergences)),
        kl_max=max(divergences, default=0.0),
        top1=same / max(1, len(divergences)),
    )


def limits(rounding: Distance, reference: torch.Tensor, *, complete: bool) -> LogitLimits:
    """Return the limits from the effect of exact rounding on these logits.

    A divergence grows with the square of the logits' distance. `complete` means that the rounding
    of every changed tensor was computed.
    """
    room = 1.0 if complete else _INCOMPLETE_FACTOR
    floor = _FLOOR * float(reference.abs().max())
    return LogitLimits(
        rms=room * rounding.rms + floor,
        max_abs=room * rounding.max_abs + floor,
        kl_mean=room**2 * rounding.kl_mean + floor**2,
        kl_max=room**2 * rounding.kl_max + floor**2,
    )


def judge(off: Distance, allowed: LogitLimits) -> list[Finding]:
    """Return a finding if merged logits differ from the exact merge's by more than the limits."""
    found = []
    for what, value, limit in (
        ("RMS difference", off.rms, allowed.rms),
        ("largest difference", off.max_abs, allowed.max_abs),
        ("mean KL divergence", off.kl_mean, allowed.kl_mean),
        ("largest KL divergence", off.kl_max, allowed.kl_max),
    ):
        if not value <= limit:
            found.append(f"{what} {value:.3g} (limit {limit:.3g})")
    if not found:
        return []
    text = ", ".join(found)
    return [
        finding(
            ERROR,
            "logits",
            f"the merged model's logits differ from base + adapter: {text}; the limits are the "
            "effect of rounding the exact sum",
        )
    ]


def judge_choices(exact: torch.Tensor, merged: torch.Tensor, allowed: LogitLimits) -> list[Finding]:
    """Return a finding if the most likely token differs and no near tie explains it."""
    best = exact.topk(2, -1).values
    margin = best[:, 0] - best[:, 1]
    wrong = (exact.argmax(-1) != merged.argmax(-1)) & (margin > 2 * allowed.max_abs)
    if not wrong.any():
        return []
    return [
        finding(
            ERROR,
            "logits",
            f"{int(wrong.sum())} of {len(exact)} positions have another most likely token, by a "
            f"margin of up to {float(margin[wrong].max()):.3g}",
        )
    ]
