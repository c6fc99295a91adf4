"""KaSA: W without its smallest singular values, plus s · B·diag·A."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from weightsmith.core.errors import InputRefused
from weightsmith.merging.outputs import Files, MergedTensor, Rows, StoredTensor, Term

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class Kasa:
    """W - U_r S_r V_r + s · B diag(d) A in float64 (Wang et al., "KaSA", 2024, section 3).

    PEFT truncates W when it loads the adapter, so the truncation is part of the adapter.
    """

    term: Term
    diagonal: StoredTensor
    whole: bool = True
    by_row: bool = False

    def held_elements(self, output: MergedTensor) -> int:
        """Return the peak number of float64 elements in memory."""
        return 5 * output.rows * output.columns

    def begin(self, output: MergedTensor, files: Files) -> Rows:
        """Return a function that computes rows."""
        from numpy.linalg import svd

        rank, right = self.term.rank, self.term.right
        if right is None or rank >= min(output.rows, output.columns):
            raise InputRefused(
                f"KaSA's rank {rank} is not below that of {output.name}",
                hint="the adapter was trained on another model",
            )
        stored = files.rows(self.diagonal.path, self.diagonal.info, 0, 1, rank)[0]
        gains = stored.astype("float64") * self.term.factor
        left = files.matrix(self.term.left).astype("float64") * gains
        other = files.matrix(right).astype("float64")

        def rows(first: int, count: int) -> np.ndarray:
            weight = output.source.rows(files, 0, output.rows, output.columns).astype("float64")
            u, s, v = svd(weight, full_matrices=False)
            weight -= (u[:, -rank:] * s[-rank:]) @ v[-rank:]
            weight += left @ other
            return weight[first : first + count]

        return rows
