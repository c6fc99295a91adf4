"""A dequantized matrix that is read a few rows at a time and compared as it is read."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

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
class Tiles:
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
            return self._looked_up(rows)
        first, last, _ = rows.indices(len(self))
        starts = range(first - first % TILE, last, TILE)
        parts = [self._tile(at)[max(0, first - at) : last - at] for at in starts]
        return parts[0] if len(parts) == 1 else torch.cat([self._tile(0)[:0], *parts])

    def _looked_up(self, rows: torch.Tensor) -> torch.Tensor:
        found = torch.empty((len(rows), *self.shape[1:]))
        for at in range(0, len(self), TILE):
            wanted = (rows >= at) & (rows < at + TILE)
            if at not in self.compared or bool(wanted.any()):
                found[wanted] = self._tile(at)[rows[wanted] - at]
        return found

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
