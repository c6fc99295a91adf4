"""What a merge writes: every output tensor, where its values come from and what changes them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from weightsmith.checkpoints.safetensors import BITS, TensorInfo

if TYPE_CHECKING:
    import numpy as np

Rows = Callable[[int, int], "np.ndarray"]
"""(first, count) -> rows of a tensor's matrix, (count, columns); called by several threads."""


class Files(Protocol):
    """The open files that a merge reads; safe for several threads. `stream.OpenFiles` is one."""

    def rows(
        self, path: Path, info: TensorInfo, first: int, count: int, columns: int
    ) -> np.ndarray:
        """Return rows of a stored tensor seen as a matrix, in its own type."""

    def array(self, path: Path, info: TensorInfo) -> np.ndarray:
        """Return a whole stored tensor of any type, in its own shape."""

    def matrix(self, part: Part) -> np.ndarray:
        """Return a factor as float32; raise InputRefused where it is not finite."""

    def once(self, key: object, make: Callable[[], np.ndarray]) -> np.ndarray:
        """Return what `make` returned for the key, kept for the blocks that follow."""


class Source(Protocol):
    """Where a tensor's unchanged values are: a file, or what is decoded from several."""

    @property
    def dtype(self) -> str:
        """The safetensors type of the values."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape."""

    def rows(self, files: Files, first: int, count: int, columns: int) -> np.ndarray:
        """Return rows of the tensor seen as a matrix with `columns` columns, in its own type."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """A tensor as a file holds it: of the base, or of an adapter where that replaces the base's."""

    path: Path
    info: TensorInfo

    @property
    def dtype(self) -> str:
        """The safetensors type of the values."""
        return self.info.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape."""
        return self.info.shape

    def rows(self, files: Files, first: int, count: int, columns: int) -> np.ndarray:
        """Return rows of the tensor seen as a matrix with `columns` columns, in its own type."""
        return files.rows(self.path, self.info, first, count, columns)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A matrix within a stored tensor: seen as `height` rows, cut, then transposed."""

    stored: Stored
    height: int
    rows: slice = field(default_factory=lambda: slice(None))
    columns: slice = field(default_factory=lambda: slice(None))
    transposed: bool = False
    blocks: int = 1
    """Row blocks that are put on the diagonal of a wider matrix (BD-LoRA)."""

    @property
    def whole(self) -> bool:
        """Say whether every element of the tensor belongs to it."""
        return self.rows == slice(None) == self.columns

    @property
    def width(self) -> int:
        """Columns of the tensor as it is stored."""
        return math.prod(self.stored.shape) // self.height if self.height else 0

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix."""
        width = self.width * self.blocks
        cut = (
            len(range(*self.rows.indices(self.height))),
            len(range(*self.columns.indices(width))),
        )
        return cut[::-1] if self.transposed else cut

    @property
    def turned(self) -> Part:
        """The same matrix, transposed."""
        return replace(self, transposed=not self.transposed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """One low-rank addition, factor · left · right, to rows `first` and following of a matrix."""

    adapter: int
    """Which adapter, by its place in the request."""
    left: Part
    """(rows, rank): B, or A transposed where the base stores (in, out)."""
    right: Part | None
    """(rank, columns); None is a single 1, so that a vector is added to a column."""
    scaling: float
    """What the adapter's configuration says."""
    factor: float
    """weight · scaling, rounded once to float64: the exact number that the merge uses."""
    first: int = 0

    @property
    def rank(self) -> int:
        """Columns of the left factor, rows of the right one."""
        return self.left.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns that it is added to."""
        return self.left.shape[0], self.right.shape[1] if self.right else 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Patch:
    """Rows that take the place of the base's: `places[i]` becomes row i of `stored`."""

    adapter: int
    places: tuple[int, ...]
    stored: Stored


class Change(Protocol):
    """A new value of a tensor that is no sum of low-rank terms: computed, then rounded once."""

    @property
    def whole(self) -> bool:
        """True where rows cannot be computed apart: the tensor is then one block."""

    @property
    def by_row(self) -> bool:
        """True where a single row can be computed again, to float64's accuracy."""

    def held_elements(self, output: Output) -> int:
        """Return how many float64 elements are in memory at a time, for the plan."""

    def begin(self, output: Output, files: Files) -> Rows:
        """Return what computes rows of the result in float64, from `output.source` and files.

        Raises InputRefused for values that are not finite.
        """


@dataclass(frozen=True, kw_only=True)
class Output:
    """One tensor of the merged checkpoint."""

    name: str
    dtype: str
    """The safetensors type that is written."""
    shape: tuple[int, ...]
    source: Source
    columns: int
    """Width of the matrix that the tensor is seen as; terms, patches and changes speak of it."""
    terms: tuple[Term, ...] = ()
    """Added exactly, in the order of the adapters."""
    patches: tuple[Patch, ...] = ()
    change: Change | None = None
    """Computes all rows instead; `terms` and `patches` are empty then."""
    kind: str = "copied"
    """`merged`, `replaced` (an adapter's tensor as it is) or `copied`."""

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
        """Say whether the source's bytes are written as they are."""
        changed = self.terms or self.patches or self.change
        return not changed and self.dtype == self.source.dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class Band:
    """Rows `first` to `end` of an output, to which the same terms are added."""

    first: int
    end: int
    terms: tuple[Term, ...]


def bands(output: Output) -> list[Band]:
    """Cut an output's rows where terms begin and end; bands without terms are there too."""
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
    """One file of the merged checkpoint: its tensors in the order of their bytes."""

    name: str
    outputs: tuple[Output, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(output.size for output in self.outputs)


def matrix_columns(shape: tuple[int, ...]) -> int:
    """Return how wide a tensor is as a matrix: its rows are what its first axis counts."""
    return math.prod(shape[1:]) if len(shape) > 1 else 1
