"""Weighted sum of several adapters' changes of one tensor, if some are not low-rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from weightsmith.merging.claim import Claim
from weightsmith.merging.outputs import Files, MergedTensor, Rows, TensorSource, Term

if TYPE_CHECKING:
    import numpy as np


Adder = Callable[["np.ndarray", int], None]
"""Adds to rows in place; the number is that of the first row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterShare:
    """One adapter's claim on a tensor, and its weight in the merge."""

    claim: Claim
    weight: float
    adapter: int
    """The adapter's place in the request, in which a folder may be twice."""
    path: Path
    """The adapter's folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """W + Σ weight · (changed - W) in float64."""

    shares: tuple[AdapterShare, ...]

    @property
    def whole(self) -> bool:
        """Return whether any change needs the whole tensor."""
        return any(share.claim.change and share.claim.change.whole for share in self.shares)

    @property
    def by_row(self) -> bool:
        """Return whether all changes can be computed row by row."""
        return all(share.claim.change.by_row for share in self.shares if share.claim.change)

    def held_elements(self, output: MergedTensor) -> int:
        """Return the peak number of float64 elements in memory."""
        held = output.rows * output.columns * 3 if self.whole else 0
        for share in self.shares:
            held += sum(term.rank * sum(term.shape) for term in share.claim.terms)
            if share.claim.change:
                held += share.claim.change.held_elements(output)
        return held

    def begin(self, output: MergedTensor, files: Files) -> Rows:
        """Return a function that computes rows of the sum."""
        plain = replace(output, change=None)
        changed = [
            (share, share.claim.change.begin(plain, files) if share.claim.change else None)
            for share in self.shares
        ]
        copies: dict[int, TensorSource] = {
            share.adapter: share.claim.replacement
            for share in self.shares
            if share.claim.replacement
        }
        adders = [adder(term, files) for share in self.shares for term in share.claim.terms]

        def rows(first: int, count: int) -> np.ndarray:
            base = output.source.rows(files, first, count, output.columns).astype("float64")
            total = base.copy()
            for add in adders:
                add(total, first)
            for share, change in changed:
                claim = share.claim
                if change is not None:
                    total += share.weight * (change(first, count) - base)
                elif claim.replacement is not None:
                    new = claim.replacement.rows(files, first, count, output.columns)
                    total += share.weight * (new.astype("float64") - base)
                elif claim.patch is not None:
                    for row, place in enumerate(claim.patch.places):
                        if first <= place < first + count:
                            # Rows were trained on the adapter's copy, if it has one.
                            old = copies.get(share.adapter, output.source)
                            new = claim.patch.stored.rows(files, row, 1, output.columns)
                            moved = new.astype("float64") - old.rows(
                                files, place, 1, output.columns
                            ).astype("float64")
                            total[place - first] += share.weight * moved[0]
            return total

        return rows


def adder(term: Term, files: Files) -> Adder:
    """Return a function that adds a term's part to the rows from `first` on, in float64."""
    left = files.matrix(term.left).astype("float64") * term.factor
    right = files.matrix(term.right).astype("float64") if term.right else None

    def add(total: np.ndarray, first: int) -> None:
        begin = max(first, term.first)
        end = min(first + len(total), term.first + len(left))
        if begin < end:
            part = left[begin - term.first : end - term.first]
            total[begin - first : end - first] += part if right is None else part @ right

    return add
