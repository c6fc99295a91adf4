"""Compare tensors of an adapter byte by byte: tied layers are saved twice."""

from __future__ import annotations

import os

from weightsmith.merging.outputs import StoredTensor
from weightsmith.models.safetensors import BITS

_PIECE = 1 << 24


def same_bytes(one: StoredTensor, other: StoredTensor) -> bool:
    """Return whether two tensors are equal byte for byte."""
    alike = (one.dtype, one.shape) == (other.dtype, other.shape)
    return alike and same_beginning(one, other)


def same_beginning(one: StoredTensor, other: StoredTensor) -> bool:
    """Return whether a tensor begins with all rows of another, byte for byte."""
    size = other.info.size
    if one.dtype != other.dtype or one.shape[1:] != other.shape[1:] or one.info.size < size:
        return False
    with one.path.open("rb") as file, other.path.open("rb") as second:
        fd, fd2 = file.fileno(), second.fileno()
        return all(
            os.pread(fd, min(_PIECE, size - at), one.info.start + at)
            == os.pread(fd2, min(_PIECE, size - at), other.info.start + at)
            for at in range(0, size, _PIECE)
        )


def same_transposed(one: StoredTensor, other: StoredTensor) -> bool:
    """Return whether one matrix is the other's transpose, byte for byte."""
    if one.dtype != other.dtype or one.shape != other.shape[::-1] or len(one.shape) != 2:
        return False
    import numpy as np

    def bits(stored: StoredTensor) -> np.ndarray:
        with stored.path.open("rb") as file:
            data = os.pread(file.fileno(), stored.info.size, stored.info.start)
        return np.frombuffer(data, f"u{BITS[stored.dtype] // 8}").reshape(stored.shape)

    return bool(np.array_equal(bits(one), bits(other).T))
