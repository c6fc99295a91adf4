"""A quantized model's weights, dequantized and compared with the checkpoint's as they are read."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from weightsmith.checkpoints.tensors import View
from weightsmith.errors import CheckFailed, Unmeasurable
from weightsmith.forward.network import lacking
from weightsmith.forward.weights import Weights


class Dequantized(Weights):
    """A view's tensors by the parameter names of the checkpoint's model.

    Only the last tensor stays in memory.
    """

    def __init__(self, root: Path, model: Any, view: View) -> None:
        """Map names as for the checkpoint in `root`."""
        super().__init__(root, model)
        self._view = view
        self._last: tuple[str, torch.Tensor] | None = None
        self.errors: dict[str, float] = {}
        """Tensor -> norm of its error, relative to the checkpoint's tensor."""

    def mapped(self, tensor: str) -> torch.Tensor:
        """Return a whole tensor as float32; see `read`."""
        if self._last is None or self._last[0] != tensor:
            self._last = None
            self._last = tensor, self._compared(tensor)
        return self._last[1]

    def read(self, tensor: str) -> torch.Tensor:
        """Return a whole tensor as float32.

        Raises Unmeasurable if the view lacks it, CheckFailed if it has another shape than the
        checkpoint's or is not finite.
        """
        return self._compared(tensor)

    def _compared(self, name: str) -> torch.Tensor:
        if name not in self._view.names:
            # Do not fall back to the checkpoint's weights.
            raise Unmeasurable(
                f"the quantized model has no tensor {name}, which its architecture needs",
                hint="use the task score instead",
            )
        data = self._view.tensor(name)
        tensor = torch.from_numpy(data if data.flags.writeable else data.copy())
        if name not in self.errors:
            self.errors[name] = self._error(name, tensor)
        return tensor

    def _error(self, name: str, tensor: torch.Tensor) -> float:
        right = self.infos[name].shape
        if tuple(tensor.shape) != tuple(right):
            raise CheckFailed(
                f"{name} has shape {list(tensor.shape)}, but {list(right)} in the checkpoint",
                hint="the quantizer wrote another model; quantize again",
            )
        error = size = 0.0
        for first, rows in self.blocks(name):
            mine = tensor[first : first + len(rows)] if rows.dim() else tensor
            theirs = rows.float()
            error += float((mine - theirs).norm()) ** 2
            size += float(theirs.norm()) ** 2
        if not math.isfinite(error):
            raise CheckFailed(
                f"{name} has NaN or infinite values",
                hint="check the merged weights for outliers, or choose a larger format",
            )
        return math.sqrt(error / size) if size else math.sqrt(error)


def require_complete(model: Any, weights: Weights) -> None:
    """Raise Unmeasurable if the checkpoint lacks a tensor of its architecture."""
    if names := lacking(model, weights):
        raise Unmeasurable(
            f"the checkpoint has no tensor {names[0]}, which its architecture needs",
            hint="use the task score instead",
        )
