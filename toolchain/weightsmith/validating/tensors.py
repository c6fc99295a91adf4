"""Check every tensor of a merged checkpoint: adapted, replaced, or unchanged."""

from __future__ import annotations

import torch

from weightsmith.forward.weights import Weights
from weightsmith.validating.diagnosis import explain
from weightsmith.validating.elements import Tally, compare_bytes, compare_rows
from weightsmith.validating.findings import ERROR, Finding, finding
from weightsmith.validating.forwards import Reference
from weightsmith.validating.mixtures import left_out
from weightsmith.validating.result import ElementCount
from weightsmith.validating.stacked import rows_of, stored


def judge_tensors(
    reference: Reference, weights: Weights, *, summed: bool
) -> tuple[list[Finding], ElementCount]:
    """Check every tensor of the merged checkpoint; if it is not a sum, only those that can be."""
    examiner = reference.examiner
    tallies = dict(examiner.tallies)
    places = {name: site for site in reference.sites for name in site.parameters.values()}
    for name, value in reference.replaced.items():
        if weights.has(name) and name not in tallies:
            tally = tallies[name] = Tally(tensor=weights.tensor_of(name) or name)
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


def _untouched(reference: Reference, weights: Weights, touched: set[str]) -> dict[str, Tally]:
    """Compare tensors that no adapter changes; a tied head counts as the embedding."""
    base = reference.base
    pairs: dict[tuple[str, str], None] = {}
    found = {}
    changed = {t for name in touched if base.has(name) for t in base.tensors_of(name)}
    for name in base.parameters:
        if name in touched or not weights.has(name):
            continue
        if not base.tensor_of(name) and changed.intersection(base.tensors_of(name)):
            tally = found[name] = Tally(tensor=name)
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
        tally = found[theirs] = Tally(tensor=theirs)
        for first, rows in base.blocks(mine):
            there = (
                weights.slice(theirs, first, first + len(rows))
                if rows.dim()
                else weights.read(theirs)
            )
            compare_bytes(tally, first, rows, there)
    return found


def _shared(reference: Reference, weights: Weights, touched: set[str]) -> list[Finding]:
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
