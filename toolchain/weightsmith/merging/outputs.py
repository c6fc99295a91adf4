"""The output tensors of a merge: sources of their values, and their changes."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from weightsmith.models.safetensors import BITS, TensorInfo

if TYPE_CHECKING:
    import numpy as np

T = TypeVar("T")
_PIECE = 1 << 24
Rows = Callable[[int, int], "np.ndarray"]
"""(first, count) -> rows of a tensor viewed as a matrix, (count, columns); thread-safe."""


class Files(Protocol):
    """The open input files of a merge; thread-safe. Implemented by `stream.OpenFiles`."""

    def rows(self, stored: StoredTensor, first: int, count: int, columns: int) -> np.ndarray:
        """Return rows of a stored tensor viewed as a matrix, in its own dtype."""

    def array(self, stored: StoredTensor) -> np.ndarray:
        """Return a whole stored tensor of any dtype, in its own shape."""

    def matrix(self, part: MatrixView | None) -> np.ndarray:
        """Return a factor as float32, None as a single 1; raise InputRefused if not finite."""

    def once(self, key: object, make: Callable[[], np.ndarray]) -> np.ndarray:
        """Return the cached result of `make` for the key."""

    def for_all(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return the result of `make` for the key, kept for all tensors of the merge."""


class TensorSource(Protocol):
    """A tensor's values before the merge: stored in a file, or dequantized."""

    @property
    def dtype(self) -> str:
        """The safetensors dtype of the values."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape."""

    def rows(self, files: Files, first: int, count: int, columns: int) -> np.ndarray:
        """Return rows of the tensor viewed as a matrix with `columns` columns, in its own dtype."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """A tensor in a file of the base, or of an adapter that replaces it."""

    path: Path
    info: TensorInfo

    @property
    def dtype(self) -> str:
        """The safetensors dtype of the values."""
        return self.info.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape."""
        return self.info.shape

    def rows(self, files: Files, first: int, count: int, columns: int) -> np.ndarray:
        """Return rows of the tensor viewed as a matrix with `columns` columns, in its own dtype."""
        return files.rows(self, first, count, columns)

    def same_bytes(self, other: StoredTensor) -> bool:
        """Return whether two tensors are equal byte for byte: tied layers are saved twice."""
        return (self.dtype, self.shape) == (other.dtype, other.shape) and self.begins_with(other)

    def begins_with(self, other: StoredTensor) -> bool:
        """Return whether a tensor begins with all rows of another, byte for byte."""
        size, alike = other.info.size, self.shape[1:] == other.shape[1:]
        if self.dtype != other.dtype or not alike or self.info.size < size:
            return False
        with self.path.open("rb") as file, other.path.open("rb") as second:
            fd, fd2 = file.fileno(), second.fileno()
            return all(
                os.pread(fd, min(_PIECE, size - at), self.info.start + at)
                == os.pread(fd2, min(_PIECE, size - at), other.info.start + at)
                for at in range(0, size, _PIECE)
            )

    def is_transpose_of(self, other: StoredTensor) -> bool:
        """Return whether one matrix is another's transpose, byte for byte."""
        if self.dtype != other.dtype or self.shape != other.shape[::-1] or len(self.shape) != 2:
            return False
        import numpy as np

        def bits(stored: StoredTensor) -> np.ndarray:
            with stored.path.open("rb") as file:
                data = os.pread(file.fileno(), stored.info.size, stored.info.start)
            return np.frombuffer(data, f"u{BITS[stored.dtype] // 8}").reshape(stored.shape)

        return bool(np.array_equal(bits(self), bits(other).T))


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixView:
    """A matrix in a stored tensor: viewed as `height` rows, sliced, then transposed."""

    stored: StoredTensor
    height: int
    rows: slice = field(default_factory=lambda: slice(None))
    columns: slice = field(default_factory=lambda: slice(None))
    transposed: bool = False
    blocks: int = 1
    """Number of row blocks to place on the diagonal of a wider matrix (BD-LoRA)."""

    @property
    def whole(self) -> bool:
        """Return whether it is the whole tensor."""
        return self.rows == slice(None) == self.columns

    @property
    def width(self) -> int:
        """Columns of the stored tensor."""
        return math.prod(self.stored.shape) // self.height if self.height else 0

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of the matrix."""
        width = self.width * self.blocks
        cut = (
            len(range(*self.rows.indices(self.height))),
            len(range(*self.columns.indices(width))),
        )
        return cut[::-1] if self.transposed else cut

    @property
    def transpose(self) -> MatrixView:
        """The same matrix, transposed."""
        return replace(self, transposed=not self.transposed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """A low-rank term factor · left · right, added to the rows of a matrix from `first` on."""

    adapter: int
    """Index of the adapter in the request."""
    left: MatrixView
    """(rows, rank): B, or A transposed if the base stores (in, out)."""
    right: MatrixView | None
    """(rank, columns); None is a single 1, to add a vector to a column."""
    scaling: float
    """The adapter's configured scaling."""
    factor: float
    """weight · scaling, rounded once to float64; the merge uses exactly this number."""
    first: int = 0

    @property
    def rank(self) -> int:
        """Columns of the left factor, rows of the right one."""
        return self.left.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of the product."""
        return self.left.shape[0], self.right.shape[1] if self.right else 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Patch:
    """Rows that replace the base's: row `places[i]` becomes row i of `stored`."""

    adapter: int
    places: tuple[int, ...]
    stored: StoredTensor


class Change(Protocol):
    """A change that is not a sum of low-rank terms: computed in float64, then rounded once."""

    @property
    def whole(self) -> bool:
        """True if rows cannot be computed separately; the tensor is then one block."""

    @property
    def by_row(self) -> bool:
        """True if a single row can be recomputed to float64 accuracy."""

    def held_elements(self, output: MergedTensor) -> int:
        """Return the peak number of float64 elements in memory, for the plan."""

    def begin(self, output: MergedTensor, files: Files) -> Rows:
        """Return a function that computes rows of the result in float64.

        Raises InputRefused for values that are not finite.
        """


@dataclass(frozen=True, kw_only=True)
class MergedTensor:
    """One tensor of the merged checkpoint."""

    name: str
    dtype: str
    """The safetensors dtype to write."""
    shape: tuple[int, ...]
    source: TensorSource
    columns: int
    """Width of the tensor viewed as a matrix, for terms, patches and changes."""
    terms: tuple[Term, ...] = ()
    """Added exactly, in the order of the adapters."""
    patches: tuple[Patch, ...] = ()
    change: Change | None = None
    """Computes all rows; then `terms` and `patches` are empty."""
    kind: str = "copied"
    """`merged`, `replaced` (by an adapter's tensor) or `copied`."""

    @cached_property
    def rows(self) -> int:
        """Rows of the matrix."""
        return math.prod(self.shape) // self.columns if self.columns else 0

    @property
    def size(self) -> int:
        """Bytes written."""
        return math.prod(self.shape) * BITS[self.dtype] // 8

    @property
    def as_is(self) -> bool:
        """Return whether the source's bytes are written unchanged."""
        changed = self.terms or self.patches or self.change
        return not changed and self.dtype == self.source.dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class Band:
    """The rows `first` to `end` of an output, with the same terms."""

    first: int
    end: int
    terms: tuple[Term, ...]


def bands(output: MergedTensor) -> list[Band]:
    """Split an output's rows where terms begin and end; some bands may have no terms."""
    ends = {0, output.rows}
    for term in output.terms:
        ends |= {term.first, term.first + term.shape[0]}
    edges = sorted(ends)
    return [
        Band(
            first=first,
            end=end,
            terms=tuple(
                term for term in output.terms if term.first <= first < term.first + term.shape[0]
            ),
        )
        for first, end in pairwise(edges)
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputShard:
    """One file of the merged checkpoint, with its tensors in file order."""

    name: str
    outputs: tuple[MergedTensor, ...]

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(output.size for output in self.outputs)


def matrix_columns(shape: tuple[int, ...]) -> int:
    """Return the width of a tensor viewed as a matrix whose rows are its first axis."""
    return math.prod(shape[1:]) if len(shape) > 1 else 1


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseLayer:
    """A layer of the base that an adapter changes."""

    module: str
    """Its path in the model, which patterns in the configuration match."""
    kind: str
    """`linear`, `embedding`, `conv1d` (GPT-2's, which stores (in, out)), `conv` or `norm`."""
    shape: tuple[int, ...]
    """Shape of the base's weight."""
    bias: bool
