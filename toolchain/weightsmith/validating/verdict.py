"""The verdict on two forward passes: measures, limits, and where the models diverge."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from weightsmith.forward.weights import Weights
from weightsmith.validating.elements import (
    TensorComparison,
    compare_bytes,
    compare_rows,
    left_out,
)
from weightsmith.validating.examine import Examiner
from weightsmith.validating.forwards import ForwardResult, ProbeBatch, ReferenceModel
from weightsmith.validating.probes import Text
from weightsmith.validating.probes import judge as judge_texts
from weightsmith.validating.result import (
    ERROR,
    NOTE,
    WARNING,
    Comparison,
    Distance,
    ElementCount,
    Finding,
    LayerDifference,
    LogitLimits,
    failed,
    finding,
)
from weightsmith.validating.sites import Site, rows_of, stored

_NOT_SUMMED = (
    "this method is not a plain sum as the reference is: the logits' distance is reported but not "
    "judged; {}, and the evaluation judges the rest"
)
_MIXED = "each element was checked against the values that the method can produce"
_UNMIXED = "tensors that no adapter changes were compared"
_BYPASSED = (
    "the model's code reads {} without calling the layer: PEFT's adapter has no effect there, so "
    "the merged weights must be the base's"
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
    twin_logits = sum(batch.counted[:twins])
    exact, there = reference.twins.logits, run.logits[:twin_logits]
    rounding = distance(reference.run.logits[:twin_logits], exact)
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
    if reference.examiner.bypassed:
        shown = ", ".join(reference.examiner.bypassed[:3])
        findings.append(finding(NOTE, "elements", _BYPASSED.format(shown)))
    layers = _layers(reference, run)
    parted = next((row.layer for row in layers if row.parted), None)
    if failed(verdict) and parted is not None:
        suspects = sorted({f.tensor for f in examined if f.layer == parted and f.tensor})
        what = f"; check {', '.join(suspects[:3])}" if suspects else ""
        message = f"hidden states first diverge in decoder layer {parted}{what}"
        where = finding(ERROR, "layers", message, suspects[0] if suspects else "")
        findings.append(replace(where, layer=parted))
    findings += verdict
    signal = reference.examiner.signal.values()
    added = sum(size**2 for size, _ in signal) ** 0.5
    lost = sum(size**2 for _, size in signal) ** 0.5 / added if added else None
    # If elements are wrong, the difference is not rounding.
    if summed and not elements.wrong and lost is not None and not lost < _SWALLOWED:
        findings.append(
            finding(
                WARNING,
                "outputs",
                f"rounding changes the adapted layers' outputs by {lost:.0%} of the adapters'"
                " effect, which is small for the checkpoint's dtype; merge with dtype float32 to"
                " keep it",
            )
        )
    return seen, Comparison(
        limits=allowed,
        rounding=rounding,
        from_exact=off,
        first_difference=parted,
        layers=layers,
        elements=elements,
        lost_to_rounding=lost,
    )


def _layers(reference: ReferenceModel, run: ForwardResult) -> tuple[LayerDifference, ...]:
    rows: list[LayerDifference] = []
    states = zip(reference.run.hidden, reference.twins.hidden, run.hidden, strict=False)
    for number, (expected, exact, there) in enumerate(states):
        size = float(expected.norm()) or 1.0
        rounding = float((exact - expected).norm()) / size
        off = float((there - exact).norm()) / size
        rows.append(
            LayerDifference(
                layer=number,
                difference=_bounded(float((there - expected).norm()) / size),
                rounding=_bounded(rounding),
                off=_bounded(off),
                parted=not off <= rounding + 2.0**-14,
            )
        )
    return tuple(rows)


def _bounded(value: float) -> float:
    """Replace NaN and infinities by a billion, so that it can be plotted."""
    return value if math.isfinite(value) else 1e9


_FLOOR = 2.0**-14
"""Relative error of float32 logits, from sums in another order."""
_INCOMPLETE_FACTOR = 4.0
"""Factor on the limits if the exact rounding of some layers was not computed."""


def distance(reference: torch.Tensor, other: torch.Tensor) -> Distance:
    """Compare logits of shape (positions, vocabulary), row by row in float64."""
    largest = total = squares = 0.0
    divergences, same = [], 0
    for expected, found in zip(reference, other, strict=True):
        p, q = expected.double(), found.double()
        off = (p - q).abs()
        largest = max(largest, float(off.max()))
        total, squares = total + float(off.sum()), squares + float(off.square().sum())
        log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
        divergences.append(max(0.0, float((log_p.exp() * (log_p - log_q)).sum())))
        same += int(expected.argmax()) == int(found.argmax())
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
    measures = (
        ("RMS difference", off.rms, allowed.rms),
        ("largest difference", off.max_abs, allowed.max_abs),
        ("mean KL divergence", off.kl_mean, allowed.kl_mean),
        ("largest KL divergence", off.kl_max, allowed.kl_max),
    )
    found = [
        f"{what} {value:.3g} (limit {limit:.3g})"
        for what, value, limit in measures
        if not value <= limit
    ]
    message = (
        f"the merged model's logits differ from base + adapter: {', '.join(found)}; the limits are"
        " the effect of rounding the exact sum"
    )
    return [finding(ERROR, "logits", message)] if found else []


def judge_choices(exact: torch.Tensor, merged: torch.Tensor, allowed: LogitLimits) -> list[Finding]:
    """Return a finding if the most likely token differs and no near tie explains it."""
    best = exact.topk(2, -1).values
    margin = best[:, 0] - best[:, 1]
    wrong = (exact.argmax(-1) != merged.argmax(-1)) & (margin > 2 * allowed.max_abs)
    if not wrong.any():
        return []
    message = (
        f"{int(wrong.sum())} of {len(exact)} positions have another most likely token, by a margin"
        f" of up to {float(margin[wrong].max()):.3g}"
    )
    return [finding(ERROR, "logits", message)]


def judge_tensors(
    reference: ReferenceModel, weights: Weights, *, summed: bool
) -> tuple[list[Finding], ElementCount]:
    """Check every tensor of the merged checkpoint; if it is not a sum, only those that can be."""
    examiner = reference.examiner
    tallies = dict(examiner.tallies)
    places = {name: site for site in reference.sites for name in site.parameters.values()}
    for name, value in reference.replaced.items():
        if weights.has(name) and name not in tallies:
            tally = tallies[name] = TensorComparison(tensor=weights.tensor_of(name) or name)
            there = weights.read(tally.tensor) if weights.tensor_of(name) else weights.whole(name)
            flat = value.reshape(len(value), -1).float()
            compare_rows(tally, 0, flat, torch.zeros_like(flat), there.reshape(len(there), -1))
    touched = set(tallies)
    tallies |= _untouched(examiner, touched)
    if not summed:
        unchecked = touched - examiner.mixed
        tallies = {name: tally for name, tally in tallies.items() if name not in unchecked}
    changed = {t.tensor: n for n, t in examiner.tallies.items() if t.changed}
    shared = [
        finding(
            ERROR,
            "elements",
            f"{name} and {changed[weights.tensor_of(name)]} share a tensor in the merged "
            "checkpoint, but the adapters change only the second: they must be untied",
            name,
        )
        for name in examiner.base.parameters
        if name not in touched and weights.tensor_of(name) in changed
    ]
    wrong = {name: tally for name, tally in tallies.items() if tally.wrong}
    found = [
        explain(tally, name, places.get(name), reference.sites, examiner)
        for name, tally in wrong.items()
    ]
    right = {name: tally.tensor for name, tally in tallies.items() if not tally.wrong}
    lacking = {name: kept for name, kept in examiner.kept.items() if name in right}
    return found + left_out(lacking, right) + shared, ElementCount(
        tensors=len(tallies),
        elements=sum(tally.total for tally in tallies.values()),
        wrong=sum(tally.wrong for tally in wrong.values()),
    )


def _untouched(examiner: Examiner, touched: set[str]) -> dict[str, TensorComparison]:
    """Compare tensors that no adapter changes; a tied head counts as the embedding."""
    base, weights = examiner.base, examiner.merged
    pairs: dict[tuple[str, str], None] = {}
    found = {}
    changed = {t for name in touched if base.has(name) for t in base.tensors_of(name)}
    for name in base.parameters:
        if name in touched or not weights.has(name):
            continue
        if not base.tensor_of(name) and changed.intersection(base.tensors_of(name)):
            tally = found[name] = TensorComparison(tensor=name)
            before, after = (rows_of(stored(one, name)) for one in (base, weights))
            compare_bytes(tally, 0, before, after)
        elif base.tensor_of(name) and weights.tensor_of(name):
            pairs[base.tensor_of(name), weights.tensor_of(name)] = None
        else:
            pairs.update(((t, t), None) for t in base.tensors_of(name) if t in weights.infos)
    pairs.update(((t, t), None) for t in base.unused if t in weights.infos)
    done = {tally.tensor for tally in examiner.tallies.values()}
    for base_name, merged_name in pairs:
        if merged_name in done or base.infos[base_name].shape != weights.infos[merged_name].shape:
            continue
        tally = found[merged_name] = TensorComparison(tensor=merged_name)
        for first, rows in base.blocks(base_name):
            last = first + len(rows) if rows.dim() else 0
            there = weights.slice(merged_name, first, last) if last else weights.read(merged_name)
            compare_bytes(tally, first, rows, there)
    return found


_ROWS = 64
_NOT_BASE = "it differs from the base although no adapter changes it"
_SIMILAR = 0.95
"""Cosine above which two changes count as the same."""


def explain(
    tally: TensorComparison,
    parameter: str,
    site: Site | None,
    others: Sequence[Site],
    examiner: Examiner,
) -> Finding:
    """Return the finding for a tensor with wrong elements, with the most likely cause."""
    name = tally.tensor or parameter
    where = f"[{tally.row}, {tally.column}] is {tally.found:.6g}, not {tally.expected:.6g}"
    tensors = examiner.merged.tensors_of(parameter) if examiner.merged.has(parameter) else ()
    if site is not None and examiner.merged.of_experts.intersection(tensors):
        # transformers stacks experts along the first dimension.
        where = f"first in expert {tally.row}: {tally.found:.6g}, not {tally.expected:.6g}"
    few = tally.wrong <= max(8, tally.total // 1000)
    if few:
        flipped = abs(tally.found + tally.expected) <= 2.0**-7 * abs(tally.expected)
        sign = " (its sign is flipped)" if flipped else ""
        count = "1 element differs" if tally.wrong == 1 else f"{tally.wrong} elements differ"
        return finding(ERROR, "elements", f"{name}: {count}: {where}{sign}", name)
    reason = ""
    if site is not None and tally.delta:
        reason = _explain_scale(tally) or _explain_place(parameter, site, others, examiner)
    elif site is None:
        other = _same_bytes(tally.tensor, examiner)
        reason = f"it has the base's {other}" if other else _NOT_BASE
    reason = reason or "it is not a merge of this base and these adapters"
    part = tally.wrong / max(1, tally.total)
    return finding(
        ERROR, "elements", f"{name}: {reason}; {part:.0%} of its elements differ: {where}", name
    )


def _explain_scale(tally: TensorComparison) -> str:
    if not tally.change:
        return "the adapter is missing: it equals the base"
    times = tally.times()
    if abs(tally.cosine()) < _SIMILAR:
        return ""
    if abs(times + 1) < 0.05:
        return "the adapter was subtracted; are base and merged model swapped?"
    if abs(times - 2) < 0.05:
        return "the adapter was added twice, or its scaling is doubled"
    return f"the adapter was added {times:.3g} times: its scaling or weight is wrong"


def _explain_place(parameter: str, site: Site, others: Sequence[Site], examiner: Examiner) -> str:
    if site.kind == "other":
        return ""
    tensor = examiner.merged.tensor_of(parameter)
    shape = examiner.merged.infos[tensor].shape
    merged = examiner.merged.slice(tensor, 0, _ROWS).float()
    base = examiner.base.slice(examiner.base.tensor_of(parameter), 0, _ROWS).float()
    factors = site.factors()
    if shape[0] == shape[1]:
        whole = examiner.merged.read(tensor)[:, :_ROWS].float().T
        if _cosine(whole, base + factors.rows(0, _ROWS)) > _SIMILAR:
            return "it is transposed"
        columns = factors.left * factors.scalings.float() @ factors.right[:, :_ROWS]
        if _cosine(merged - base, columns.T) > _SIMILAR:
            return "the adapter was added transposed"
    shapes = factors.left.shape, factors.right.shape
    for other in others:
        if other is site or other.kind == "other":
            continue
        other_factors = other.factors()
        if (other_factors.left.shape, other_factors.right.shape) != shapes:
            continue
        name = other.parameters["weight"]
        if _cosine(merged - base, other_factors.rows(0, _ROWS)) > _SIMILAR:
            return f"the added delta belongs to {name}"
        there = examiner.base.slice(examiner.base.tensor_of(name), 0, _ROWS).float()
        if _cosine(merged, there + other_factors.rows(0, _ROWS)) > _SIMILAR:
            return f"it has the values of {name}"
    return ""


def _same_bytes(tensor: str, examiner: Examiner) -> str:
    """Return the other base tensor with the same first row as a merged tensor, or ""."""
    base, merged = examiner.base, examiner.merged
    shape = merged.infos[tensor].shape if tensor in merged.infos else ()
    if not shape:
        return ""
    row = merged.slice(tensor, 0, 1)
    for name, info in base.infos.items():
        if name != tensor and info.shape == shape and torch.equal(base.slice(name, 0, 1), row):
            return name
    return ""


def _cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    size = float(one.norm() * other.norm())
    return float((one * other).sum()) / size if size else 0.0
