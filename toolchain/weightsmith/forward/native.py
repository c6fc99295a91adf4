"""Products by our kernel in C, where it is compiled.

Most products have few inputs, one token of each question, so converting a matrix weighs as much as
multiplying it, and the kernel does both at once: with float16 weights on one core of an EPYC with
AVX-512, 78 billion operations per second with 33 inputs, where oneDNN and the conversion did 57. It
is optional and in no pin.

On CPUs with AMX, weights in bfloat16 are multiplied by its tiles: each input is split into three
bfloat16, so nothing is lost, and products take half the CPU time.
"""

from __future__ import annotations

import threading
from functools import cache

import torch

from weightsmith.core.kernels import library

_TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
"""As in types.h."""
_PACKED = 256 * 512
"""As in products.h."""
_MOST, _FAST = 16, 8
"""Lanes of the widest vectors, and of those with which the kernel beats torch's libraries."""
_PARTS, _INPUTS, _COLUMNS, _ROOM = 3, 16, 32, 288 << 10
"""As in tiles.h."""
_scratch = threading.local()


@cache
def is_fast() -> bool:
    """Return whether the kernel is there and this CPU has vectors that are wide enough for it."""
    kernels = library.found()
    return kernels is not None and kernels.weightsmith_lanes(_MOST) >= _FAST


def multiply(rows: torch.Tensor, tile: torch.Tensor, out: torch.Tensor) -> None:
    """Multiply rows [n, columns], contiguous, with a tile [m, columns] transposed into `out`.

    `rows` and `out` are float32; `out` [n, m] may be columns of a wider tensor. Other threads run
    meanwhile.
    """
    if tile.dtype not in _TYPES:
        tile = tile.float()
    tile = tile.contiguous()
    if not hasattr(_scratch, "packed"):
        _scratch.packed = torch.empty(_PACKED)
    library.kernels().weightsmith_multiply_rows(
        *(rows.data_ptr(), len(rows), tile.data_ptr(), _TYPES[tile.dtype], len(tile)),
        *(rows.shape[1], out.data_ptr(), out.stride(0), _scratch.packed.data_ptr()),
    )


@cache
def has_tiles() -> bool:
    """Return whether the kernel is there, and this process may use AMX on this CPU."""
    kernels = library.found()
    return kernels is not None and bool(kernels.weightsmith_tiles())


def split(rows: torch.Tensor) -> torch.Tensor:
    """Return the parts of rows [n, columns], float32 and contiguous, as the tiles take them."""
    count, columns = (
        -(-size // to) * to for size, to in zip(rows.shape, (_INPUTS, _COLUMNS), strict=True)
    )
    parts = torch.empty(_PARTS * count * columns, dtype=torch.bfloat16)
    library.kernels().weightsmith_split_inputs(rows.data_ptr(), *rows.shape, parts.data_ptr())
    return parts


def multiply_split(parts: torch.Tensor, count: int, tile: torch.Tensor, out: torch.Tensor) -> None:
    """Multiply as `multiply` does, `count` rows that are split with a tile in bfloat16."""
    tile = tile.contiguous()
    if not hasattr(_scratch, "room"):
        _scratch.room = torch.empty(_ROOM, dtype=torch.uint8)
    library.kernels().weightsmith_multiply_split(
        *(parts.data_ptr(), count, tile.data_ptr(), *tile.shape),
        *(out.data_ptr(), out.stride(0), _scratch.room.data_ptr()),
    )
