"""Diagnose a wrong tensor: adapter missing, added twice, transposed, or of another layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from weightsmith.validating.elements import Factors, Tally
from weightsmith.validating.examine import Examiner
from weightsmith.validating.findings import ERROR, Finding, finding
from weightsmith.validating.sites import Site

_ROWS = 64
_NOT_BASE = "it differs from the base although no adapter changes it"
_SIMILAR = 0.95
"""Cosine above which two changes count as the same."""


def explain(
    tally: Tally, parameter: str, site: Site | None, others: Sequence[Site], examiner: Examiner
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


def _explain_scale(tally: Tally) -> str:
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
