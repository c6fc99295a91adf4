"""The change of one tensor by several adapters, if not a plain sum of low-rank deltas."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from weightsmith.core.errors import InputRefused
from weightsmith.merging.claim import Claim
from weightsmith.merging.combining.combination import Combination
from weightsmith.merging.outputs import Band, Files, MergedTensor, Rows, TensorSource, Term, bands

if TYPE_CHECKING:
    import numpy as np

    from weightsmith.merging.combining.methods import Factors, LowRankDelta

Adder = Callable[["np.ndarray", int], None]
"""Adds to rows in place; the number is that of the first row."""
_ROWS = 1 << 20
"""Elements of a delta computed at once."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Combined:
    """W plus the combination of the adapters' deltas, in float64, rounded once."""

    shares: tuple[AdapterShare, ...]
    combination: Combination
    whole: bool = False
    """Once the deltas are computed, rows are independent."""
    by_row: bool = True
    """Deltas are computed in fixed blocks, so single rows give the same bits."""

    def held_elements(self, output: MergedTensor) -> int:
        """Return the number of float64 elements in memory: factors, or one delta per adapter."""
        factors = sum(t.rank * sum(t.shape) for share in self.shares for t in share.claim.terms)
        if not self.combination.needs_deltas and self._low_rank:
            return 4 * factors
        deltas = output.rows * output.columns * (len(self._adapters) + 2) // 2
        more = 2 * output.rows * output.columns if self.combination.truncates else 0
        return factors + deltas + more

    def begin(self, output: MergedTensor, files: Files) -> Rows:
        """Return a function that computes rows of the result."""
        made: list[tuple[int, np.ndarray, np.ndarray]] = []
        deltas: list[np.ndarray] = []
        weights = self._weights
        if self.combination.truncates or self.combination.space == "factors":
            made = [(band.first, *self.factors(output, band, files)) for band in self.bands(output)]
        else:
            deltas = self._deltas(output, files)

        def rows(first: int, count: int) -> np.ndarray:
            from weightsmith.merging.combining.methods import combine

            total = output.source.rows(files, first, count, output.columns).astype("float64")
            if deltas:
                total += combine(
                    [d[first : first + count] for d in deltas], weights, self.combination
                )
            for start, left, right in made:
                low, high = max(first, start), min(first + count, start + len(left))
                if low < high:
                    part = left[low - start : high - start].astype(total.dtype)
                    total[low - first : high - first] += part @ right
            return total

        return rows

    @property
    def _adapters(self) -> dict[int, AdapterShare]:
        return {share.adapter: share for share in self.shares}

    @property
    def _weights(self) -> list[float]:
        return [share.weight for share in self._adapters.values()]

    @property
    def _low_rank(self) -> bool:
        return all(share.claim.terms for share in self.shares)

    @property
    def _terms(self) -> tuple[Term, ...]:
        return tuple(term for share in self.shares for term in share.claim.terms)

    def bands(self, output: MergedTensor) -> list[Band]:
        """Return row ranges changed by the same adapters; each has its own low-rank result.

        A method that needs deltas gets the whole tensor, or each layer that it consists of.
        """
        layers = any(share.claim.piece for share in self.shares)
        if not self._low_rank or (self.combination.needs_deltas and not layers):
            return [Band(first=0, end=output.rows, terms=self._terms)]
        found = bands(replace(output, terms=self._terms, change=None))
        return [band for band in found if band.terms]

    def rank(self, output: MergedTensor, band: Band) -> int:
        """Return the largest possible rank of a band's result."""
        ranks = [term.rank for term in band.terms]
        width = min(band.end - band.first, output.columns)
        if not self.combination.needs_deltas and self._low_rank:
            width = min(width, sum(ranks))
        if self.combination.truncates:
            return min(self.combination.rank or max(ranks, default=width), width)
        return sum(ranks) if self.combination.method == "cat" else max(ranks)

    def factors(self, output: MergedTensor, band: Band, files: Files) -> Factors:
        """Return the combined (left, right) of a band in float32; their product is the delta."""
        from weightsmith.merging.combining.methods import (
            combine,
            to_float32,
            truncate,
            truncate_whole,
        )

        rank = self.rank(output, band)
        if self.combination.space == "factors" and not self.combination.truncates:
            return self._combined_factors(output.name, band, files)
        if not self.combination.needs_deltas and self._low_rank:
            pairs = [pair(term, band, files) for term in band.terms]
            return to_float32(truncate(pairs, rank), output.name)
        deltas = [delta[band.first : band.end] for delta in self._deltas(output, files)]
        whole = combine(deltas, self._weights, self.combination)
        return to_float32(truncate_whole(whole, rank), output.name)

    def _deltas(self, output: MergedTensor, files: Files) -> list[np.ndarray]:
        """Return each adapter's pruned delta of the whole tensor at weight 1, in float32."""
        from weightsmith.merging.combining.methods import prune

        deltas = [self._delta(output, adapter, files) for adapter in self._adapters]
        names = [adapter_digest(share.path, files) for share in self._adapters.values()]
        for band in self.bands(output):
            some = [delta[band.first : band.end] for delta in deltas]
            name = f"{output.name} {band.first}" if band.first else output.name
            prune(some, self.combination, name, names)
        return deltas

    def _delta(self, output: MergedTensor, adapter: int, files: Files) -> np.ndarray:
        import numpy as np

        shares = []
        for share in self.shares:
            if share.adapter == adapter:
                terms = tuple(replace(term, factor=term.scaling) for term in share.claim.terms)
                claim = replace(share.claim, terms=terms)
                shares.append(replace(share, claim=claim, weight=1.0))
        alone = Mixture(shares=tuple(shares))
        changed = alone.begin(replace(output, change=None), files)
        delta = np.empty((output.rows, output.columns), np.float32)
        step = output.rows if alone.whole else max(1, _ROWS // output.columns)
        for first in range(0, output.rows, step):
            count = min(step, output.rows - first)
            base = output.source.rows(files, first, count, output.columns)
            delta[first : first + count] = changed(first, count) - base.astype(np.float64)
        return delta

    def _combined_factors(self, name: str, band: Band, files: Files) -> Factors:
        import numpy as np

        from weightsmith.merging.combining.methods import Factor, combine_factors

        factors = []
        for share in self.shares:
            term = share.claim.terms[0]
            if term in band.terms:
                left, right = files.matrix(term.left), files.matrix(term.right)
                # The left factor is A transposed if the base stores (in, out).
                a, b = (left.T, right.T) if term.left.transposed else (right, left)
                factors.append(
                    Factor(
                        a=np.ascontiguousarray(a),
                        b=np.ascontiguousarray(b),
                        weight=share.weight,
                        scaling=term.scaling,
                        adapter=adapter_digest(share.path, files),
                    )
                )
        a, b = combine_factors(factors, self.combination, name)
        return (a.T, b.T) if band.terms[0].left.transposed else (b, a)


def combined(name: str, shares: Sequence[AdapterShare], combination: Combination) -> Combined:
    """Return the change; raise InputRefused if the method is not defined for these shares.

    On factors, what PEFT's `add_weighted_adapter` ignores or gets wrong is refused.
    """
    made = Combined(shares=tuple(shares), combination=combination)
    if combination.space != "factors":
        return made
    hint = "omit --space: delta space supports every change"
    for share in shares:
        terms = share.claim.terms
        plain = len(terms) == 1 and terms[0].right is not None
        if not plain or not (terms[0].left.whole and terms[0].right and terms[0].right.whole):
            raise InputRefused(
                f"{share.path} changes {name} by more than one pair of factors, which PEFT's "
                "combination of factors ignores",
                hint=hint,
            )
    ranks = {term.rank for share in shares for term in share.claim.terms}
    if len(ranks) > 1 and not combination.truncates and combination.method != "cat":
        raise InputRefused(
            f"the adapters' ranks for {name} differ ({', '.join(map(str, sorted(ranks)))}), but "
            f"{combination.method} on factors needs equal ranks",
            hint=hint,
        )
    return made


def pair(term: Term, band: Band, files: Files) -> LowRankDelta:
    """Return a term's factors for the rows of a band, with weight · scaling as the gain."""
    from weightsmith.merging.combining.methods import LowRankDelta

    start = band.first - term.first
    left = files.matrix(term.left)[start : start + band.end - band.first]
    return LowRankDelta(left=left, right=files.matrix(term.right), gain=term.factor)


def adapter_digest(root: Path, files: Files) -> str:
    """Return the adapter's identity for random draws: the sha256 of its weights."""
    from weightsmith.merging.stream import sha256_file

    path = root / "adapter_model.safetensors"
    return files.for_all(path, lambda: sha256_file(path))  # each tensor asks for each adapter's
