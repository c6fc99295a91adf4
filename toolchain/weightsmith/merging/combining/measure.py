"""Measure conflicts between the adapters of a plan on the tensors that they share."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace

from weightsmith.merging.combining.changes import Combined, pair
from weightsmith.merging.combining.conflicts import Conflicts
from weightsmith.merging.mixture import Mixture
from weightsmith.merging.outputs import MergedTensor, Term, bands
from weightsmith.merging.stream import OpenFiles


def measure(outputs: Iterable[MergedTensor]) -> Conflicts:
    """Compare the adapters on every tensor to which at least two of them add factors.

    Changes other than low-rank terms, such as DoRA's norms, are not counted.
    """
    conflicts, files = Conflicts(), OpenFiles()
    try:
        for output in outputs:
            terms = terms_of(output)
            if len({term.adapter for term in terms}) < 2:
                continue
            for band in bands(replace(output, terms=terms, change=None)):
                pairs = defaultdict(list)
                for term in band.terms:
                    pairs[term.adapter].append(pair(term, band, files))
                if len(pairs) > 1:
                    conflicts.add(output.name, pairs)
    finally:
        files.close()
    return conflicts


def terms_of(output: MergedTensor) -> tuple[Term, ...]:
    """Return the low-rank terms of an output, however they are combined."""
    if isinstance(output.change, Combined | Mixture):
        return tuple(term for share in output.change.shares for term in share.claim.terms)
    return output.terms
