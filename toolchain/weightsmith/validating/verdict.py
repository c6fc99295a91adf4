"""The verdict on two forward passes: measures, limits, and where the models diverge."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from weightsmith.forward.weights import Weights
from weightsmith.validating.findings import ERROR, NOTE, WARNING, Finding, failed, finding
from weightsmith.validating.forwards import Batch, Reference, Run
from weightsmith.validating.greedy import Text
from weightsmith.validating.greedy import judge as judge_texts
from weightsmith.validating.logits import distance, judge, judge_choices, limits
from weightsmith.validating.result import Comparison, Distance, LayerDifference
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
    reference: Reference,
    run: Run,
    weights: Weights,
    batch: Batch,
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


def _layers(reference: Reference, run: Run) -> tuple[LayerDifference, ...]:
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


def _swallowed(reference: Reference) -> tuple[list[Finding], float | None]:
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
