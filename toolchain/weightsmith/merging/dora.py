"""DoRA: each row (or column) of W + s·BA scaled to a trained norm.

Computed in float64 and rounded once, without a certificate: integers are possible here too, but
slow, and the last bit differs only about once in 10^10 elements.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from weightsmith.core.errors import InputRefused
from weightsmith.merging.mixture import Adder, adder
from weightsmith.merging.outputs import Files, MergedTensor, Rows, StoredTensor, Term

if TYPE_CHECKING:
    import numpy as np


_PASS = 1 << 18
"""Elements processed at once when computing column norms."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dora:
    """m · (W + s·BA) / ‖W + s·BA‖, in float64 (Liu et al., "DoRA", 2024, equation 5)."""

    term: Term
    magnitude: StoredTensor
    by_column: bool
    """True if the base stores (in, out), so that norms are of columns."""
    whole: bool = False
    by_row: bool = True

    def held_elements(self, output: MergedTensor) -> int:
        """Return the peak number of float64 elements in memory."""
        return self.term.rank * sum(self.term.shape) + 2 * (output.rows + output.columns)

    def begin(self, output: MergedTensor, files: Files) -> Rows:
        """Return a function that computes rows; column norms need a pass over the tensor first."""
        width = output.columns if self.by_column else output.rows
        count = math.prod(self.magnitude.shape)
        magnitude = files.rows(self.magnitude.path, self.magnitude.info, 0, 1, count)[0]
        if len(magnitude) != width:
            raise InputRefused(
                f"{self.magnitude.info.name} has {len(magnitude)} elements, but {output.name} "
                f"needs {width}",
                hint="the adapter was trained on another model",
            )
        target, add = magnitude.astype("float64"), adder(self.term, files)
        columns = self._column_norms(output, files, add) if self.by_column else None

        def rows(first: int, count: int) -> np.ndarray:
            total = _sum(output, files, add, first, count)
            if columns is not None:
                total *= target / columns
            else:
                norms = (total * total).sum(1) ** 0.5
                total *= (target[first : first + count] / norms)[:, None]
            return total

        return rows

    @staticmethod
    def _column_norms(output: MergedTensor, files: Files, add: Adder) -> np.ndarray:
        step = max(1, _PASS // output.columns)
        first = _sum(output, files, add, 0, min(step, output.rows))
        squares: np.ndarray = (first * first).sum(0)
        for start in range(step, output.rows, step):
            part = _sum(output, files, add, start, min(step, output.rows - start))
            squares += (part * part).sum(0)
        squares **= 0.5
        return squares


def _sum(output: MergedTensor, files: Files, add: Adder, first: int, count: int) -> np.ndarray:
    total = output.source.rows(files, first, count, output.columns).astype("float64")
    add(total, first)
    return total
