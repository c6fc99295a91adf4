"""Check every tensor of a merged checkpoint: adapted, replaced, or unchanged."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from weightsmith.forward.weights import Weights
from weightsmith.validating.elements import Factors, TensorComparison, compare_bytes, compare_rows
from weightsmith.validating.examine import Examiner
from weightsmith.validating.findings import ERROR, Finding, finding
from weightsmith.validating.forwards import ReferenceModel
from weightsmith.validating.mixtures import left_out
from weightsmith.validating.result import ElementCount
from weightsmith.validating.sites import Site
from weightsmith.validating.stacked import rows_of, stored


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
    tallies |= _untouched(reference, weights, touched)
    if not summed:
        unchecked = touched - examiner.mixed
        tallies = {name: tally for name, tally in tallies.items() if name not in unchecked}
    shared = _shared(reference, weights, touched)
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


def _untouched(
    reference: ReferenceModel, weights: Weights, touched: set[str]
) -> dict[str, TensorComparison]:
    """Compare tensors that no adapter changes; a tied head counts as the embedding."""
    base = reference.base
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
    done = {t.tensor for n, t in reference.examiner.tallies.items()}
    for mine, theirs in pairs:
        if theirs in done or base.infos[mine].shape != weights.infos[theirs].shape:
            continue
        tally = found[theirs] = TensorComparison(tensor=theirs)
        for first, rows in base.blocks(mine):
            there = (
                weights.slice(theirs, first, first + len(rows))
                if rows.dim()
                else weights.read(theirs)
            )
            compare_bytes(tally, first, rows, there)
    return found


def _shared(reference: ReferenceModel, weights: Weights, touched: set[str]) -> list[Finding]:
    """Return a finding if two parameters share a tensor and adapters change only one of them."""
    base = reference.base
    changed = {t.tensor: n for n, t in reference.examiner.tallies.items() if t.changed}
    return [
        finding(
            ERROR,
            "elements",
            f"{name} and {changed[weights.tensor_of(name)]} share a tensor in the merged "
            "checkpoint, but the adapters change only the second: they must be untied",
            name,
        )
        for name in base.parameters
        if name not in touched and weights.tensor_of(name) in changed
    ]


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
    """Explain a wrong tensor by how many times the delta was added."""
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
    """Check whether it is transposed, or got another layer's delta."""
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
        if _cosine(merged - base, _columns(factors).T) > _SIMILAR:
            return "the adapter was added transposed"
    for other in others:
        if other is site or other.kind == "other":
            continue
        theirs = other.factors()
        if theirs.left.shape != factors.left.shape or theirs.right.shape != factors.right.shape:
            continue
        name = other.parameters["weight"]
        if _cosine(merged - base, theirs.rows(0, _ROWS)) > _SIMILAR:
            return f"the added delta belongs to {name}"
        there = examiner.base.slice(examiner.base.tensor_of(name), 0, _ROWS).float()
        if _cosine(merged, there + theirs.rows(0, _ROWS)) > _SIMILAR:
            return f"it has the values of {name}"
    return ""


def _columns(factors: Factors) -> torch.Tensor:
    """Return the first columns of a delta."""
    return factors.left * factors.scalings.float() @ factors.right[:, :_ROWS]


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
    """Return the cosine between two changes."""
    size = float(one.norm() * other.norm())
    return float((one * other).sum()) / size if size else 0.0
