"""FRoD: a weight written anew in a basis that layers of one role share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from weightsmith.errors import InputRefused
from weightsmith.merging.outputs import Files, Output, Rows, Stored

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class Frod:
    """U (diag(l) + S) Vᵀ in float64, with U the columns of W V⁻ᵀ brought to length 1.

    `FrodLayer` in peft/tuners/frod/layer.py. PEFT computes V anew from the weights of all layers
    each time it loads; here it is the one that the adapter holds, whose training it was.
    """

    basis: Stored
    """V, (in, in)."""
    places: Stored
    """Rows and columns of what S has, (2, n)."""
    values: Stored
    """S at these places, (n,)."""
    lengths: Stored
    """l, (in,)."""
    transposed: bool
    """True where the base stores (in, out)."""
    whole: bool = True
    by_row: bool = False

    def held_elements(self, output: Output) -> int:
        """Return how many float64 elements are in memory at a time."""
        width = output.rows if self.transposed else output.columns
        return 3 * output.rows * output.columns + 3 * width * width

    def begin(self, output: Output, files: Files) -> Rows:
        """Return what computes rows."""
        import numpy as np

        def rows(first: int, count: int) -> np.ndarray:
            weight = output.source.rows(files, 0, output.rows, output.columns).astype("float64")
            weight = weight.T if self.transposed else weight
            basis = files.array(self.basis.path, self.basis.info).astype("float64")
            try:
                turned = np.linalg.solve(basis, weight.T).T
            except np.linalg.LinAlgError as error:
                raise InputRefused(
                    f"{self.basis.info.name} is singular, so that {output.name} cannot be written "
                    "in it",
                    hint="the adapter's file is damaged; export it again with save_pretrained",
                ) from error
            norms = np.sqrt(np.einsum("ij,ij->j", turned, turned))
            kept = norms > _SMALLEST
            turned = np.where(kept, turned, 0.0) / np.where(kept, norms, 1.0)
            inner = np.diag(files.array(self.lengths.path, self.lengths.info).astype("float64"))
            at = files.array(self.places.path, self.places.info).astype("int64")
            if at.size and not (at.min() >= 0 and at.max() < len(inner)):
                raise InputRefused(
                    f"{self.places.info.name} names places outside of {list(inner.shape)}",
                    hint="the adapter's file is damaged; export it again with save_pretrained",
                )
            new = files.array(self.values.path, self.values.info).astype("float64")
            np.add.at(inner, (at[0], at[1]), new)
            changed = turned @ inner @ basis.T
            changed = changed.T if self.transposed else changed
            return np.ascontiguousarray(changed[first : first + count])

        return rows


_SMALLEST = 1e-12
"""Lengths below it count as none; PEFT's own limit."""
