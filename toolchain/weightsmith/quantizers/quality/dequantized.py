"""A quantized model's weights, dequantized and compared with the checkpoint's as they are read.

The measures of a whole model hardly show one wrong tensor of hundreds. The error of rounding is
known per type and depends on the weights only by how much a block's largest exceeds the others, so
each tile of 256 rows has a limit: twice the error of normal weights. Limits by a format's bits
would not do, since Q4_K_M also has tensors of six bits. AWQ moves scales between layers and clips,
so its matrices are compared after the best scale per input.
"""

from __future__ import annotations

import math
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from weightsmith.core.errors import CheckFailed, Unmeasurable
from weightsmith.forward.weights import Weights
from weightsmith.models.tensors import View
from weightsmith.quantizers.quality.result import TensorFault, short

if TYPE_CHECKING:
    from weightsmith.forward.kinds import Model
    from weightsmith.forward.weights import LazyRows


class Dequantized(Weights):
    """A view's tensors by the parameter names of the checkpoint's model.

    Matrices are read a few rows at a time, and what fits of the last one stays in memory.
    """

    def __init__(self, root: Path, model: Model, view: View) -> None:
        """Map names as for the checkpoint in `root`."""
        super().__init__(root, model)
        self._view = view
        self._last: tuple[str, LazyMatrix] | None = None
        self._squares: dict[str, dict[int, Squares]] = defaultdict(dict)
        self._faults: dict[str, list[TensorFault]] = defaultdict(list)

    @property
    def errors(self) -> Mapping[str, float]:
        """Tensor -> norm of its error, relative to the checkpoint's tensor, as far as it was read.

        Sums are in the order of the rows, whichever thread compared them first.
        """
        found = {}
        for name, tiles in self._squares.items():
            inorder = [tiles[at] for at in sorted(tiles)]
            error, size = sum(one.error for one in inorder), sum(one.size for one in inorder)
            found[name] = Squares(error, size).relative
        return found

    @property
    def faults(self) -> Sequence[TensorFault]:
        """Tensors with rows that are further from the checkpoint's than their type explains.

        Of several, the worst rows are named, and the first of these, whichever thread found them.
        """
        return [
            min(self._faults[name], key=lambda one: (-one.error, one.row))
            for name in sorted(self._faults)
        ]

    def mapped(self, tensor: str) -> Any:
        """Return a tensor whose rows are dequantized when they are used; see `read`."""
        if self._last is None or self._last[0] != tensor:
            self._last = None
            self._last = tensor, self._tiles(tensor)
        return self._last[1]

    def experts(self, parameter: str) -> Sequence[Sequence[Callable[[], torch.Tensor | LazyRows]]]:
        """Return what reads single experts, as for a checkpoint; () if one tensor has all."""
        return super().experts(parameter) if not self.tensor_of(parameter) else ()

    def compare_rest(self) -> None:
        """Compare the experts that got no token.

        Raises Unmeasurable and CheckFailed as `read` does.
        """
        for name in sorted(self.of_experts):
            if not self._squares.get(name):
                self.read(name)

    def read(self, tensor: str) -> torch.Tensor:
        """Return a whole tensor as float32.

        Raises Unmeasurable if the view lacks it, CheckFailed if it has another shape than the
        checkpoint's or is not finite.
        """
        self._require(tensor)
        values = torch.from_numpy(np.require(self._view.tensor(tensor), requirements="W"))
        self._check_shape(tensor, values, 0, None)
        if not self._squares.get(tensor):
            found = [
                self._compared(tensor, first, values[first : first + len(rows)], rows)
                if rows.dim()
                else self._compared(tensor, first, values, rows)
                for first, rows in self.blocks(tensor)
            ]
            self._squares[tensor] = dict(enumerate(found))
        return values

    def _tiles(self, name: str) -> LazyMatrix:
        self._require(name)
        shape, right = torch.Size(self.infos[name].shape), super().mapped(name)

        def read(first: int, last: int) -> torch.Tensor:
            # The last tile asks for one row more, which only a tensor of another height has.
            end = last + (last == shape[0])
            rows = np.require(self._view.rows(name, first, end), requirements="W")
            tile = torch.from_numpy(rows)
            self._check_shape(name, tile, first, last)
            return tile

        def compare(first: int, tile: torch.Tensor) -> Squares:
            return self._compared(name, first, tile, right[first : first + len(tile)])

        return LazyMatrix(shape, read, self._squares[name], compare)

    def _require(self, name: str) -> None:
        if name not in self._view.names:
            # Do not fall back to the checkpoint's weights.
            raise Unmeasurable(
                f"the quantized model has no tensor {name}, which its architecture needs",
                hint="use the task score instead",
            )

    def _check_shape(self, name: str, rows: torch.Tensor, first: int, last: int | None) -> None:
        right = self.infos[name].shape
        height = [len(range(count)[first:last]) for count in right[:1]]
        if [*rows.shape] != [*height, *right[1:]]:
            shape = [first + len(rows), *rows.shape[1:]] if rows.dim() else []
            more = last is not None and [*rows.shape[1:]] == [*right[1:]] and shape > [*right]
            what = f"more than {right[0]} rows" if more else f"shape {shape}"
            raise CheckFailed(
                f"{name} has {what}, but {list(right)} in the checkpoint",
                hint="the quantizer wrote another model; quantize again",
            )

    def _compared(
        self, name: str, first: int, dequantized: torch.Tensor, rows: torch.Tensor
    ) -> Squares:
        original = rows.float()
        error = float((dequantized - original).norm()) ** 2
        if not math.isfinite(error):
            raise CheckFailed(
                f"{name} has NaN or infinite values",
                hint="check the merged weights for outliers, or choose a larger format",
            )
        found = Squares(error, float(original.norm()) ** 2)
        kind = self._view.kind(name)
        rounding = ROUNDING.get(kind) if rows.dim() > 1 else None
        if rounding is not None and found.relative > rounding.usual:
            most, tiny = rounding.limit(original), rows.numel() * rounding.tiny**2
            if found.relative > most and found.error > tiny:
                error, limit = short(found.relative), short(most)
                fault = TensorFault(tensor=name, row=first, kind=kind, error=error, limit=limit)
                self._faults[name].append(fault)
        return found


TILE = 256
"""Rows that are dequantized at a time."""
KEPT = 128 << 20
"""Bytes of the last matrix that stay in memory, since a head is read once per part of the text."""


@dataclass(frozen=True, slots=True)
class Squares:
    """Sums of squares over a tile: of its error, and of the checkpoint's weights."""

    error: float
    size: float

    @property
    def relative(self) -> float:
        """The norm of the error, divided by that of the weights unless they are all zero."""
        return math.sqrt(self.error / self.size) if self.size else math.sqrt(self.error)


@dataclass(slots=True)
class LazyMatrix:
    """Stands for a matrix where only rows of it are read; several threads may read it."""

    shape: torch.Size
    read: Callable[[int, int], torch.Tensor]
    """(first row, end) -> float32 [rows, columns]."""
    compared: dict[int, Squares]
    """First row of a tile -> its squares; each tile is compared when it is first read."""
    compare: Callable[[int, torch.Tensor], Squares]
    _kept: dict[int, torch.Tensor] = field(default_factory=dict)
    _room: int = KEPT
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __len__(self) -> int:
        """Return the number of rows."""
        return self.shape[0]

    def __getitem__(self, rows: slice | torch.Tensor) -> torch.Tensor:
        """Return rows as float32: a slice without step, or the rows of an index.

        An index is an embedding's, which compares all tiles and not only those that a text uses.
        """
        if isinstance(rows, torch.Tensor):
            found = torch.empty((len(rows), *self.shape[1:]))
            for at in range(0, len(self), TILE):
                wanted = (rows >= at) & (rows < at + TILE)
                if at not in self.compared or bool(wanted.any()):
                    found[wanted] = self._tile(at)[rows[wanted] - at]
            return found
        first, last, _ = rows.indices(len(self))
        starts = range(first - first % TILE, last, TILE)
        parts = [self._tile(at)[max(0, first - at) : last - at] for at in starts]
        return parts[0] if len(parts) == 1 else torch.cat([self._tile(0)[:0], *parts])

    def _tile(self, at: int) -> torch.Tensor:
        tile = self._kept.get(at)
        if tile is None:
            tile = self.read(at, min(at + TILE, len(self)))
            if at not in self.compared:
                self.compared[at] = self.compare(at, tile)
            size = tile.numel() * tile.element_size()
            with self._lock:
                if size <= self._room:
                    self._room -= size
                    self._kept[at] = tile
        return tile


_MARGIN = 2.0
_HIGHEST = 0.95
"""A tensor of zeros has an error of 1."""
_COPIED = 0.01
"""For weights in 16 or 32 bits."""
_TINY = 2.0**-14
"""Root mean square of an error that is no damage. Scales in float16 have steps of 2**-24, which are
multiplied by up to 1000. So weights below 0.0001, such as those of tokens that no text has, may
become zero; errors of up to 0.000035 were measured."""
_TINY_COPIED = 2.0**-24
"""The same for float16 itself."""


@dataclass(frozen=True, slots=True)
class Rounding:
    """A type's relative error on normally distributed weights."""

    error: float
    block: int = 32
    """Weights that share a scale, whose largest decides the error; 0: none does; -1: a row."""
    tiny: float = _TINY
    """Root mean square of an error that is no damage, however small the weights are."""

    @property
    def usual(self) -> float:
        """The largest error of normally distributed weights that is no damage."""
        return min(_HIGHEST, _MARGIN * self.error)

    def limit(self, rows: torch.Tensor) -> float:
        """Return the largest error of these rows, [n, columns], that is no damage.

        It grows with how much larger the blocks' largest weights are than those of normal ones. The
        largest of n normal numbers is about 1.28 + 0.31 log n, as the root of its mean square.
        Measured: 2.14 for 16, 2.40 for 32, 2.87 for 128, 3.65 for 2048.
        """
        excess = 1.0
        if self.block:
            width = rows.shape[-1] if self.block < 0 else self.block
            flat = rows.reshape(-1, rows.shape[-1])
            if flat.shape[-1] % width:
                flat = torch.nn.functional.pad(flat, (0, width - flat.shape[-1] % width))
            largest = flat.reshape(len(flat), -1, width).abs().amax(-1)
            mean = float(rows.square().mean()) or math.inf
            normal = 1.28 + 0.31 * math.log(width)
            excess = max(1.0, math.sqrt(float(largest.square().mean()) / mean) / normal)
        return min(_HIGHEST, _MARGIN * self.error * excess)


ROUNDING: Mapping[str, Rounding] = {
    "q8_0": Rounding(0.0054),
    "q6_k": Rounding(0.0189),
    "q5_k": Rounding(0.0374),
    "q5_1": Rounding(0.0379),
    "q5_0": Rounding(0.0427),
    "q4_k": Rounding(0.0765),
    "q4_1": Rounding(0.0782),
    "iq4_nl": Rounding(0.0795),
    "iq4_xs": Rounding(0.0799),
    "q4_0": Rounding(0.0861),
    "nvfp4": Rounding(0.1032),
    "mxfp4": Rounding(0.1145),
    "q3_k": Rounding(0.1565),
    "iq3_s": Rounding(0.1663),
    "iq3_xxs": Rounding(0.2165),
    "iq2_s": Rounding(0.2749),
    "q2_k": Rounding(0.2970),
    "iq2_xs": Rounding(0.3403),
    "iq2_xxs": Rounding(0.3820),
    "int-quantized": Rounding(0.0083, block=-1),
    "float-quantized": Rounding(0.0263, block=0),
    "nvfp4-pack-quantized": Rounding(0.1032, block=16),
    "mxfp4-pack-quantized": Rounding(0.1145),
    # With groups of 128; rounding errors are moved to other weights on purpose.
    "gptq": Rounding(0.2, block=128),
    "f32": Rounding(_COPIED / _MARGIN, block=0, tiny=_TINY_COPIED),
    "f16": Rounding(_COPIED / _MARGIN, block=0, tiny=_TINY_COPIED),
    "bf16": Rounding(_COPIED / _MARGIN, block=0, tiny=_TINY_COPIED),
}
"""Below two bits, and where scales are moved between tensors (AWQ), no limit would say anything."""
