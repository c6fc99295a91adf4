"""The verdict on two forward passes: measures, limits, and where the models diverge."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from weightsmith.forward.weights import Weights
from weightsmith.validating.findings import ERROR, NOTE, WARNING, Finding, failed, finding
from weightsmith.validating.forwards import ForwardResult, ProbeBatch, ReferenceModel
from weightsmith.validating.greedy import Text
from weightsmith.validating.greedy import judge as judge_texts
from weightsmith.validating.result import Comparison, Distance, LayerDifference, LogitLimits
from weightsmith.validating.tensors import judge_tensors

_NOT_SUMMED = (
    "this method is not a plain sum as the reference is: the logits' distance is reported but not "
    "judged; {}, and the evaluation judges the rest"
)
_MIXED = "each element was checked against the values that the method can produce"
_UNMIXED = "tensors that no adapter changes were compared"
_BYPASSED = (
    "the model's code reads {} without calling the layer: there the adapter takes effect only when "
    "merged, and had none in training; the logits' distance is reported but not judged"
)
_SWALLOWED = 0.5
"""Fraction of the adapter's effect that rounding may take without a warning."""


def judge_models(
    reference: ReferenceModel,
    run: ForwardResult,
    weights: Weights,
    batch: ProbeBatch,
    twins: int,
    findings: list[Finding],
    texts: Sequence[Text],
    *,
    summed: bool,
) -> tuple[Distance, Comparison]:
    """Return the distance of the logits and the comparison; append to `findings` what is wrong.

    `summed` means that the merge is the weighted sum that the reference computes; otherwise the
    distance is reported but not judged.
    """
    examined, elements = judge_tensors(reference, weights, summed=summed)
    findings += reference.examiner.findings
    findings += examined
    mine = sum(batch.counted[:twins])
    exact, there = reference.twins.logits, run.logits[:mine]
    rounding = distance(reference.run.logits[:mine], exact)
    seen, off = distance(reference.run.logits, run.logits), distance(exact, there)
    complete = not reference.examiner.unjudged
    allowed = limits(rounding, reference.run.logits, complete=complete)
    verdict = judge(off, allowed) + judge_choices(exact, there, allowed)
    verdict += judge_texts(texts, allowed)
    if not bool(torch.isfinite(run.logits).all()):
        verdict = [finding(ERROR, "logits", "the merged model's logits are not finite")]
    if not summed:
        judged = _MIXED if reference.examiner.mixed else _UNMIXED
        verdict = [finding(NOTE, "logits", _NOT_SUMMED.format(judged))]
    if failed(verdict) and reference.examiner.bypassed and not elements.wrong:
        shown = ", ".join(reference.examiner.bypassed[:3])
        verdict = [finding(WARNING, "logits", _BYPASSED.format(shown))]
    layers = _layers(reference, run)
    parted = next((row.layer for row in layers if row.parted), None)
    if failed(verdict) and parted is not None:
        findings.append(_where(parted, examined))
    findings += verdict
    lost, swallowed = _swallowed(reference)
    # If elements are wrong, the difference is not rounding.
    findings += lost if summed and not elements.wrong else []
    return seen, Comparison(
        limits=allowed,
        rounding=rounding,
        from_exact=off,
        first_difference=parted,
        layers=layers,
        elements=elements,
        lost_to_rounding=swallowed,
    )


def _layers(reference: ReferenceModel, run: ForwardResult) -> tuple[LayerDifference, ...]:
    """Return the distance of the hidden states after each layer from the reference's."""
    rows: list[LayerDifference] = []
    states = zip(reference.run.hidden, reference.twins.hidden, run.hidden, strict=False)
    for number, (mine, exact, there) in enumerate(states):
        size = float(mine.norm()) or 1.0
        rounding, off = float((exact - mine).norm()) / size, float((there - exact).norm()) / size
        rows.append(
            LayerDifference(
                layer=number,
                difference=_bounded(float((there - mine).norm()) / size),
                rounding=_bounded(rounding),
                off=_bounded(off),
                parted=not off <= rounding + 2.0**-14,
            )
        )
    return tuple(rows)


def _bounded(value: float) -> float:
    """Replace NaN and infinities by a billion, so that it can be plotted."""
    return value if math.isfinite(value) else 1e9


def _where(parted: int, examined: Sequence[Finding]) -> Finding:
    suspects = sorted({f.tensor for f in examined if f.layer == parted and f.tensor})
    what = f"; check {', '.join(suspects[:3])}" if suspects else ""
    message = f"hidden states first diverge in decoder layer {parted}{what}"
    return Finding(
        severity=ERROR,
        check="layers",
        message=message,
        tensor=suspects[0] if suspects else "",
        layer=parted,
    )


def _swallowed(reference: ReferenceModel) -> tuple[list[Finding], float | None]:
    """Return a warning if rounding removed most of the adapter, and the fraction removed."""
    signal = reference.examiner.signal.values()
    added = sum(size**2 for size, _ in signal) ** 0.5
    lost = sum(size**2 for _, size in signal) ** 0.5
    if not added:
        return [], None
    part = lost / added
    if part < _SWALLOWED:
        return [], part
    return [
        finding(
            WARNING,
            "outputs",
            f"rounding changes the adapted layers' outputs by {part:.0%} of the adapters' effect, "
            "which is small for the checkpoint's dtype; merge with dtype float32 to keep it",
        )
    ], part


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
