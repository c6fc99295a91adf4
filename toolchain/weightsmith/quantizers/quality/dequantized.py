"""A quantized model's weights, dequantized and compared with the checkpoint's as they are read."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from weightsmith.core.errors import CheckFailed, Unmeasurable
from weightsmith.forward.network import lacking
from weightsmith.forward.weights import Weights
from weightsmith.models.tensors import View
from weightsmith.quantizers.quality.faults import ROUNDING
from weightsmith.quantizers.quality.result import TensorFault
from weightsmith.quantizers.quality.tiles import Squares, Tiles
from weightsmith.quantizers.quality.totals import short


class Dequantized(Weights):
    """A view's tensors by the parameter names of the checkpoint's model.

    Matrices are read a few rows at a time, and what fits of the last one stays in memory.
    """

    def __init__(self, root: Path, model: Any, view: View) -> None:
        """Map names as for the checkpoint in `root`."""
        super().__init__(root, model)
        self._view = view
        self._last: tuple[str, Tiles] | None = None
        self._squares: dict[str, dict[int, Squares]] = defaultdict(dict)
        self._faults: dict[str, list[TensorFault]] = defaultdict(list)

    @property
    def errors(self) -> Mapping[str, float]:
        """Tensor -> norm of its error, relative to the checkpoint's tensor, as far as it was read.

        Sums are in the order of the rows, whichever thread compared them first.
        """
        return {name: _relative(tiles) for name, tiles in self._squares.items()}

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

    def experts(self, parameter: str) -> Sequence[Sequence[Callable[[], Any]]]:
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
        values = _as_tensor(self._view.tensor(tensor))
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

    def _tiles(self, name: str) -> Tiles:
        self._require(name)
        shape, right = torch.Size(self.infos[name].shape), super().mapped(name)

        def read(first: int, last: int) -> torch.Tensor:
            # The last tile asks for one row more, which only a tensor of another height has.
            end = last + (last == shape[0])
            tile = _as_tensor(self._view.rows(name, first, end))
            self._check_shape(name, tile, first, last)
            return tile

        def compare(first: int, tile: torch.Tensor) -> Squares:
            return self._compared(name, first, tile, right[first : first + len(tile)])

        return Tiles(shape, read, self._squares[name], compare)

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

    def _compared(self, name: str, first: int, mine: torch.Tensor, rows: torch.Tensor) -> Squares:
        theirs = rows.float()
        error = float((mine - theirs).norm()) ** 2
        if not math.isfinite(error):
            raise CheckFailed(
                f"{name} has NaN or infinite values",
                hint="check the merged weights for outliers, or choose a larger format",
            )
        found = Squares(error, float(theirs.norm()) ** 2)
        if rows.dim() > 1 and (fault := self._fault(name, first, found, theirs)):
            self._faults[name].append(fault)
        return found

    def _fault(
        self, name: str, first: int, found: Squares, rows: torch.Tensor
    ) -> TensorFault | None:
        kind = self._view.kind(name)
        rounding, error = ROUNDING.get(kind), found.relative
        if rounding is None or error <= rounding.usual:
            return None
        most, tiny = rounding.limit(rows), found.error <= rows.numel() * rounding.tiny**2
        if tiny or error <= most:
            return None
        return TensorFault(tensor=name, row=first, kind=kind, error=short(error), limit=short(most))


def _as_tensor(data: Any) -> torch.Tensor:
    values = np.asarray(data)
    return torch.from_numpy(values if values.flags.writeable else values.copy())


def _relative(tiles: Mapping[int, Squares]) -> float:
    """Return the norm of all tiles' errors, relative to that of the weights."""
    inorder = [tiles[at] for at in sorted(tiles)]
    error, size = (sum(getattr(one, part) for one in inorder) for part in ("error", "size"))
    return Squares(error, size).relative


def require_complete(model: Any, weights: Weights) -> None:
    """Raise Unmeasurable if the checkpoint lacks a tensor of its architecture."""
    if names := lacking(model, weights):
        raise Unmeasurable(
            f"the checkpoint has no tensor {names[0]}, which its architecture needs",
            hint="use the task score instead",
        )
