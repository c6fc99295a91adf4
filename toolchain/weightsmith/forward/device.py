"""Products of inputs with a matrix in a file, on a GPU.

Only the products move: the next piece of a matrix is copied while one is multiplied, in float32
without TF32, so answers differ from the CPU's only at near ties. Moving whole views would need a
second way to fill layers that PEFT computes from whole weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from weightsmith.forward.computed import LazyRows

_ROWS = 4096
"""Rows of a matrix that are copied at a time: few gigabytes, and copies long enough to be fast."""


class DeviceCopier:
    """Copies a matrix to a device piece by piece; the next is copied while one is multiplied."""

    def __init__(self, device: torch.device, rows: int = _ROWS) -> None:
        # In full float32: TF32 would round inputs to ten bits, and answers would differ.
        torch.set_float32_matmul_precision("highest")
        self._device = device
        self._rows = rows
        stream: Any = torch.cuda.Stream
        self._copies = stream(device) if device.type == "cuda" else None

    @torch.no_grad()  # in inference mode, the model's code could not change the product in place
    def multiply(self, inputs: torch.Tensor, matrix: torch.Tensor | LazyRows) -> torch.Tensor:
        """Return inputs [n, columns] times the matrix [rows, columns] transposed; on the CPU."""
        here, start = inputs.to(self._device), 0
        output = torch.empty((len(inputs), len(matrix)))
        for piece in self._pieces(matrix):
            # Back at once: a whole product can be large, the device holds a few pieces.
            output[:, start : start + len(piece)] = torch.mm(here, piece.float().T)
            start += len(piece)
        return output

    def _pieces(self, matrix: torch.Tensor | LazyRows) -> Iterator[torch.Tensor]:
        """Yield the matrix on the device, some rows at a time, in its own dtype."""
        waiting: tuple[torch.Tensor, Any] | None = None
        for part in matrix.split(self._rows):
            following = self._copied(part)
            if waiting is not None:
                yield self._wait_for_copy(*waiting)
            waiting = following
        if waiting is not None:
            yield self._wait_for_copy(*waiting)

    def _copied(self, part: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
        if self._copies is None:
            return part.to(self._device), None
        with torch.cuda.stream(self._copies):
            piece = part.pin_memory().to(self._device, non_blocking=True)
            return piece, self._copies.record_event()

    def _wait_for_copy(self, piece: torch.Tensor, event: torch.cuda.Event) -> torch.Tensor:
        """Return a piece that the products may use: they wait for its copy, and it for them."""
        if event is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(event)
            piece.record_stream(current)
        return piece


def on_gpu() -> DeviceCopier | None:
    """Return the products of the first GPU that this torch can use, None if there is none."""
    if not torch.cuda.is_available():
        return None
    try:
        products = DeviceCopier(torch.device("cuda"))
        products.multiply(torch.ones(1, 1), torch.ones(1, 1))
    except (RuntimeError, AssertionError):  # torch was built for other drivers or cards
        return None
    return products
