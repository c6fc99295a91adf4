"""The verdict on two forwards: measures, limits, and where the models part."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from weightsmith.validating.findings import ERROR, NOTE, WARNING, Finding, failed, finding
from weightsmith.validating.forwards import Batch, Reference, Run
from weightsmith.validating.greedy import Text
from weightsmith.validating.greedy import judge as judge_texts
from weightsmith.validating.logits import (
    Distance,
    LogitLimits,
    distance,
    judge,
    judge_choices,
    limits,
)
from weightsmith.validating.tensors import judge_tensors
from weightsmith.validating.weights import Weights

_NOT_SUMMED = (
    "this method is no plain sum, which the reference is: how far their logits are apart is told "
    "and not judged; {}, and the evaluation judges the rest"
)
_MIXED = "each element was held against what the method can make of the adapters' changes"
_UNMIXED = "what no adapter changes was compared"
_BYPASSED = (
    "the model's code reads {} without calling the layer: there the adapter acts in the merge and "
    "not beside the base, where training could not reach it either; the logits' distance is told "
    "and not judged"
)
_SWALLOWED = 0.5
"""Part of the adapter's effect that rounding may take before it is worth a warning."""


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
) -> dict[str, Any]:
    """Return what was measured of both models, and add to the findings what is wrong.

    `summed` says that the merge is the weighted sum that the reference computes; of others the
    distance is reported and not judged.
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
    if failed(verdict) and reference.examiner.bypassed and not elements["wrong"]:
        shown = ", ".join(reference.examiner.bypassed[:3])
        verdict = [finding(WARNING, "logits", _BYPASSED.format(shown))]
    layers = _layers(reference, run)
    parted = next((row["layer"] for row in layers if row["parted"]), None)
    if failed(verdict) and parted is not None:
        findings.append(_where(parted, examined))
    findings += verdict
    lost, swallowed = _swallowed(reference)
    # Of a wrong merge the rest says nothing about rounding.
    findings += lost if summed and not elements["wrong"] else []
    measured = {
        "max_abs_logit_diff": seen.max_abs,
        "mean_abs_logit_diff": seen.mean_abs,
        "kl_mean": seen.kl_mean,
        "kl_max": seen.kl_max,
        "top1_agreement": seen.top1,
    }
    return {
        # Of logits that are no numbers nothing was measured, the agreement included.
        **(measured if math.isfinite(seen.max_abs) else dict.fromkeys(measured)),
        "limits": _measures(allowed),
        "rounding": _measures(rounding),
        "from_exact": _measures(off),
        "first_difference": parted,
        "layers": layers,
        "elements": elements,
        "lost_to_rounding": swallowed,
    }


def _layers(reference: Reference, run: Run) -> list[dict[str, Any]]:
    """Return how far the hidden states after each layer are from the reference's.

    All as parts of their size: `difference` of the merged model, `rounding` of the exact merge, and
    `off`, between those two, which is arithmetic alone where the merge is right.
    """
    rows: list[dict[str, Any]] = []
    states = zip(reference.run.hidden, reference.twins.hidden, run.hidden, strict=False)
    for number, (mine, exact, there) in enumerate(states):
        size = float(mine.norm()) or 1.0
        rounding, off = float((exact - mine).norm()) / size, float((there - exact).norm()) / size
        rows.append(
            {
                "layer": number,
                "difference": _bounded(float((there - mine).norm()) / size),
                "rounding": _bounded(rounding),
                "off": _bounded(off),
                "parted": not off <= rounding + 2.0**-14,
            }
        )
    return rows


def _bounded(value: float) -> float:
    """Return a number that can be drawn: NaN and infinities become a billion."""
    return value if math.isfinite(value) else 1e9


def _where(parted: int, examined: Sequence[Finding]) -> Finding:
    suspects = sorted({f.tensor for f in examined if f.layer == parted and f.tensor})
    what = f"; suspect {', '.join(suspects[:3])}" if suspects else ""
    message = f"the two part in decoder layer {parted}{what}"
    return Finding(
        severity=ERROR,
        check="layers",
        message=message,
        tensor=suspects[0] if suspects else "",
        layer=parted,
    )


def _swallowed(reference: Reference) -> tuple[list[Finding], float | None]:
    """Return a warning where rounding took most of the adapter, and the part that it took."""
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
            f"rounding changes the adapted layers' outputs by {part:.0%} of what the adapters add: "
            "they are small against the checkpoint's type; merge with dtype float32 to keep them",
        )
    ], part


def _measures(value: Distance | LogitLimits) -> dict[str, float]:
    return {name: getattr(value, name) for name in value.__slots__}
