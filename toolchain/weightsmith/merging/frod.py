"""FRoD: a weight expressed in a basis shared by layers of the same role."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from weightsmith.core.errors import InputRefused
from weightsmith.merging.outputs import Files, MergedTensor, Rows, StoredTensor

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class Frod:
    """U (diag(l) + S) Vᵀ in float64, where U has the normalised columns of W V⁻ᵀ.

    `FrodLayer` in peft/tuners/frod/layer.py. PEFT recomputes V from the weights of all layers
    each time it loads; here it is the adapter's, which was used in training.
    """

    basis: StoredTensor
    """V, (in, in)."""
    places: StoredTensor
    """Rows and columns of the nonzeros of S, (2, n)."""
    values: StoredTensor
    """The nonzeros of S, (n,)."""
    lengths: StoredTensor
    """l, (in,)."""
    transposed: bool
    """True if the base stores (in, out)."""
    whole: bool = True
    by_row: bool = False

    def held_elements(self, output: MergedTensor) -> int:
        """Return the peak number of float64 elements in memory."""
        width = output.rows if self.transposed else output.columns
        return 3 * output.rows * output.columns + 3 * width * width

    def begin(self, output: MergedTensor, files: Files) -> Rows:
        """Return a function that computes rows."""
        import numpy as np

        def rows(first: int, count: int) -> np.ndarray:
            weight = output.source.rows(files, 0, output.rows, output.columns).astype("float64")
            weight = weight.T if self.transposed else weight
            basis = files.array(self.basis.path, self.basis.info).astype("float64")
            try:
                coordinates = np.linalg.solve(basis, weight.T).T
            except np.linalg.LinAlgError as error:
                raise InputRefused(
                    f"{self.basis.info.name} is singular, so {output.name} cannot be merged",
                    hint="the adapter's file is damaged; export it again with save_pretrained",
                ) from error
            norms = np.sqrt(np.einsum("ij,ij->j", coordinates, coordinates))
            kept = norms > _SMALLEST
            coordinates = np.where(kept, coordinates, 0.0) / np.where(kept, norms, 1.0)
            inner = np.diag(files.array(self.lengths.path, self.lengths.info).astype("float64"))
            at = files.array(self.places.path, self.places.info).astype("int64")
            if at.size and not (at.min() >= 0 and at.max() < len(inner)):
                raise InputRefused(
                    f"{self.places.info.name} has indices outside of {list(inner.shape)}",
                    hint="the adapter's file is damaged; export it again with save_pretrained",
                )
            new = files.array(self.values.path, self.values.info).astype("float64")
            np.add.at(inner, (at[0], at[1]), new)
            changed = coordinates @ inner @ basis.T
            changed = changed.T if self.transposed else changed
            return np.ascontiguousarray(changed[first : first + count])

        return rows


_SMALLEST = 1e-12
"""Norms below it count as zero; PEFT's limit."""
