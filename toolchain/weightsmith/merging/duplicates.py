"""Compare tensors of an adapter byte by byte: tied layers are saved twice."""

from __future__ import annotations

import os
from pathlib import Path

from weightsmith.models.safetensors import BITS, TensorInfo

_PIECE = 1 << 24


def same_bytes(
    path: Path, one: TensorInfo, other: TensorInfo, other_path: Path | None = None
) -> bool:
    """Return whether two tensors, of one file or two, are equal byte for byte."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return _same(path, one, other_path or path, other, one.size)


def same_beginning(path: Path, one: TensorInfo, other_path: Path, other: TensorInfo) -> bool:
    """Return whether a tensor begins with all rows of another, byte for byte."""
    fits = one.dtype == other.dtype and one.shape[1:] == other.shape[1:] and one.size >= other.size
    return fits and _same(path, one, other_path, other, other.size)


def _same(path: Path, one: TensorInfo, other_path: Path, other: TensorInfo, size: int) -> bool:
    with path.open("rb") as file, other_path.open("rb") as second:
        fd, fd2 = file.fileno(), second.fileno()
        return all(
            os.pread(fd, min(_PIECE, size - at), one.start + at)
            == os.pread(fd2, min(_PIECE, size - at), other.start + at)
            for at in range(0, size, _PIECE)
        )


def same_transposed(path: Path, one: TensorInfo, other: TensorInfo) -> bool:
    """Return whether one matrix of a file is the other's transpose, byte for byte."""
    if one.dtype != other.dtype or one.shape != other.shape[::-1] or len(one.shape) != 2:
        return False
    import numpy as np

    kind = f"u{BITS[one.dtype] // 8}"
    with path.open("rb") as file:
        first, second = (
            np.frombuffer(os.pread(file.fileno(), info.size, info.start), kind).reshape(info.shape)
            for info in (one, other)
        )
    return bool(np.array_equal(first, second.T))
