"""Quantize rows to llama.cpp's types: by our kernels, and by llama.cpp's code for other types.

llama.cpp searches scales in scalar code, 35 to 140 ns per weight. The sub-blocks are independent,
so each vector lane has a row of its own: 3 to 10 ns with AVX-512. Intrinsics would need one source
per CPU, numba is a third as fast, and the sums of llama.cpp's own loops have a fixed order, so no
compiler vectorizes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING

from weightsmith.core.kernels import library

if TYPE_CHECKING:
    import numpy as np

_QUANTIZED = -1
_NOT_WIDE = {"BF16": 0, "F16": 1}
"""Numbers in the kernels' `types.h`."""
_NEEDS_IMPORTANCE = frozenset({"IQ2_XXS", "IQ2_XS", "IQ1_S"})


def number(kind: str) -> int:
    """Return llama.cpp's number of a type."""
    return _numbers()[kind]


def row_bytes(kind: str, columns: int) -> int:
    """Return the bytes of a row; `columns` must be a multiple of the type's block."""
    return int(library.ggml().ggml_row_size(number(kind), columns))


def quantize_rows(kind: str, rows: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    """Return rows in llama.cpp's bytes: uint8 [n, bytes per row].

    `rows` is float32 [n, columns], C-contiguous and finite; `importance` is float32 [columns] or
    None. Other threads run meanwhile. Raises ValueError if the result has NaN or infinite scales,
    or if the type needs importance and there is none.
    """
    import numpy as np

    if importance is None and kind in _NEEDS_IMPORTANCE:
        raise ValueError(f"type {kind} needs importance")
    type_, (count, columns) = number(kind), rows.shape
    made = np.empty((count, row_bytes(kind, columns)), np.uint8)
    source, target = rows.ctypes.data, made.ctypes.data
    weights = None if importance is None else importance.ctypes.data
    done = library.kernels().weightsmith_quantize_rows(
        type_, source, target, count, columns, weights
    )
    if done != _QUANTIZED:
        # Another type, or weights so small that 1 / scale is infinite: such scales are stored as 0.
        library.ggml().ggml_quantize_chunk(type_, source, target, 0, count, columns, weights)
    check_rows(kind, made)
    return made


def widen(kind: str, data: np.ndarray) -> np.ndarray:
    """Return weights of type F32, F16 or BF16 as float32, exactly: C-contiguous, of data's shape.

    `data` has one element per weight, of any type of the weight's size.
    """
    import numpy as np

    if kind not in _NOT_WIDE:
        return data.view(np.float32)
    data, out = np.ascontiguousarray(data), np.empty(data.shape, np.float32)
    library.kernels().weightsmith_widen(
        data.ctypes.data, _NOT_WIDE[kind], data.size, out.ctypes.data
    )
    return out


def check_rows(kind: str, rows: np.ndarray) -> None:
    """Raise ValueError if a C-contiguous array has NaN or infinite scales or weights."""
    if not library.ggml().ggml_validate_row_data(number(kind), rows.ctypes.data, rows.nbytes):
        raise ValueError(f"NaN or infinity in rows of type {kind}")


@cache
def _numbers() -> Mapping[str, int]:
    ggml = library.ggml()
    named = ((ggml.ggml_type_name(n), n) for n in range(ggml.ggml_rows_types()))
    return {name.decode().upper(): n for name, n in named if name}
