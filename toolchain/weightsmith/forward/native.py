"""Products by our kernel in C, where it is compiled.

Most products have few inputs, one token of each question, so converting a matrix weighs as much as
multiplying it, and the kernel does both at once: with float16 weights on one core of an EPYC with
AVX-512, 78 billion operations per second with 33 inputs, where oneDNN and the conversion did 57. It
is optional and in no pin.
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
