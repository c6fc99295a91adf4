"""What a wrong tensor looks like: the adapter missing, twice, transposed, or another layer's."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from weightsmith.validating.elements import Factors, Tally
from weightsmith.validating.examine import Examiner
from weightsmith.validating.findings import ERROR, Finding, finding
from weightsmith.validating.sites import Site

_ROWS = 64
_NOT_THE_BASE = "no adapter changes it, and it is not the base's"
_ALIKE = 0.95
"""Cosine from which on two changes count as the same."""


def explain(
    tally: Tally, parameter: str, site: Site | None, others: Sequence[Site], examiner: Examiner
) -> Finding:
    """Return the finding of a tensor with wrong elements, with what it most looks like."""
    name = tally.tensor or parameter
    where = f"[{tally.row}, {tally.column}] is {tally.found:.6g}, not {tally.wanted:.6g}"
    if site is not None and not examiner.merged.tensor_of(parameter):
        # Stacked as transformers stacks them: the first index is the expert.
        where = f"the first in expert {tally.row}: {tally.found:.6g}, not {tally.wanted:.6g}"
    few = tally.wrong <= max(8, tally.total // 1000)
    if few:
        flipped = abs(tally.found + tally.wanted) <= 2.0**-7 * abs(tally.wanted)
        sign = " (its sign is flipped)" if flipped else ""
        count = "1 element differs" if tally.wrong == 1 else f"{tally.wrong} elements differ"
        return finding(ERROR, "elements", f"{name}: {count}: {where}{sign}", name)
    reason = ""
    if site is not None and tally.delta:
        reason = _of_change(tally) or _of_place(parameter, site, others, examiner)
    elif site is None:
        other = _same_bytes(tally.tensor, examiner)
        reason = f"it holds the base's {other}" if other else _NOT_THE_BASE
    reason = reason or "it is no merge of this base and these adapters"
    part = tally.wrong / max(1, tally.total)
    return finding(
        ERROR, "elements", f"{name}: {reason}; {part:.0%} of its elements differ: {where}", name
    )


def _of_change(tally: Tally) -> str:
    """Judge by how often the delta is in what was added."""
    if not tally.change:
        return "the adapter is missing from it, it is the base's"
    times = tally.times()
    if abs(tally.likeness()) < _ALIKE:
        return ""
    if abs(times + 1) < 0.05:
        return "the adapter was taken out of it; are base and merged the right way round?"
    if abs(times - 2) < 0.05:
        return "the adapter is in it twice, or its scaling is doubled"
    return f"the adapter is in it {times:.3g} times, so its scaling or weight is off"


def _of_place(parameter: str, site: Site, others: Sequence[Site], examiner: Examiner) -> str:
    """Look whether it is transposed, or whether another layer's delta was added to it."""
    if site.kind == "other":
        return ""
    tensor = examiner.merged.tensor_of(parameter)
    shape = examiner.merged.infos[tensor].shape
    merged = examiner.merged.slice(tensor, 0, _ROWS).float()
    base = examiner.base.slice(examiner.base.tensor_of(parameter), 0, _ROWS).float()
    factors = site.factors()
    if shape[0] == shape[1]:
        whole = examiner.merged.read(tensor)[:, :_ROWS].float().T
        if _like(whole, base + factors.rows(0, _ROWS)) > _ALIKE:
            return "it is transposed"
        if _like(merged - base, _columns(factors).T) > _ALIKE:
            return "the adapter was added transposed"
    for other in others:
        if other is site or other.kind == "other":
            continue
        theirs = other.factors()
        if theirs.left.shape != factors.left.shape or theirs.right.shape != factors.right.shape:
            continue
        name = other.parameters["weight"]
        if _like(merged - base, theirs.rows(0, _ROWS)) > _ALIKE:
            return f"what was added belongs to {name}"
        there = examiner.base.slice(examiner.base.tensor_of(name), 0, _ROWS).float()
        if _like(merged, there + theirs.rows(0, _ROWS)) > _ALIKE:
            return f"it holds what belongs into {name}"
    return ""


def _columns(factors: Factors) -> torch.Tensor:
    """Return the first columns of a delta."""
    return factors.left * factors.scalings.float() @ factors.right[:, :_ROWS]


def _same_bytes(tensor: str, examiner: Examiner) -> str:
    """Return the other tensor of the base whose first row a merged tensor has, or nothing."""
    base, merged = examiner.base, examiner.merged
    shape = merged.infos[tensor].shape if tensor in merged.infos else ()
    if not shape:
        return ""
    row = merged.slice(tensor, 0, 1)
    for name, info in base.infos.items():
        if name != tensor and info.shape == shape and torch.equal(base.slice(name, 0, 1), row):
            return name
    return ""


def _like(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the cosine between two changes."""
    size = float(one.norm() * other.norm())
    return float((one * other).sum()) / size if size else 0.0
