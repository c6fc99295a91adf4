"""A faster reader of GGUF metadata, based on the gguf package."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader as PackageReader
from gguf import GGUFValueType

_HEAD = 12
"""Size of an array's header: 4 bytes type, 8 bytes length."""
_LENGTH = struct.Struct("<Q")


class GGUFReader(PackageReader):  # type: ignore[misc] # the package has no types
    """The package's reader, but metadata arrays are read at once.

    The package creates several views of a memory map per value, which takes seconds for a
    tokenizer's hundreds of thousands. Raises OSError, and ValueError for anything but a complete
    GGUF file in this machine's byte order.
    """

    def __init__(self, path: Path) -> None:
        """Read everything but the tensors' data, which is mapped."""
        try:
            with np.errstate(all="raise"):
                super().__init__(path)
        # Caused by wrong numbers in damaged files, such as offsets beyond the end.
        except (ArithmeticError, LookupError, TypeError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from None
        # Tensors that share bytes would be written once for each: gigabytes from kilobytes.
        room = len(self.data) - self.data_offset
        if sum(int(tensor.n_bytes) for tensor in self.tensors) > max(0, room):
            raise ValueError("its tensors overlap")

    @property
    def data(self) -> np.ndarray:
        """The file's bytes as a plain array: views of a memory map are ten times slower."""
        return self._plain

    @data.setter
    def data(self, mapped: np.memmap) -> None:
        self._map: mmap.mmap = mapped._mmap  # type: ignore[attr-defined]  # noqa: SLF001 - numpy's
        self._plain = mapped.view(np.ndarray)

    def forget_pages(self) -> None:
        """Let the kernel take back what was read; it is read again when it is used again."""
        self._map.madvise(mmap.MADV_DONTNEED)

    def _get_field_parts(
        self, orig_offs: int, raw_type: int
    ) -> tuple[int, list[Any], Sequence[int], list[GGUFValueType]]:
        """Return a value's size, its parts, the indices of data parts, and its types."""
        if self.byte_order != "I":
            raise ValueError("wrong byte order")
        if raw_type != GGUFValueType.ARRAY:
            found: tuple[int, list[Any], list[int], list[GGUFValueType]]
            found = super()._get_field_parts(orig_offs, raw_type)
            return found
        kind, count = self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)
        first, length = orig_offs + _HEAD, int(count[0])
        if kind[0] == GGUFValueType.STRING:
            values = _strings(self.data, first, length)
        elif scalar := self.gguf_scalar_to_np.get(GGUFValueType(kind[0])):
            if length * np.dtype(scalar).itemsize > len(self.data) - first:
                raise ValueError(f"an array of {length} values is longer than the file")
            values = [self._get(first, scalar, length)]
        else:
            raise ValueError("nested arrays are not supported")
        size = _HEAD + sum(value.nbytes for value in values)
        if kind[0] == GGUFValueType.STRING:
            size += _LENGTH.size * length
        data = range(2, 2 + len(values))
        return size, [kind, count, *values], data, [GGUFValueType(raw_type), GGUFValueType(kind[0])]


def _strings(data: np.ndarray, offset: int, count: int) -> list[memoryview]:
    raw, found = data.data, list[memoryview]()
    for _ in range(count):
        if offset + _LENGTH.size > len(raw):
            raise ValueError(f"an array of {count} strings is longer than the file")
        (length,) = _LENGTH.unpack_from(raw, offset)
        offset += _LENGTH.size
        if length > len(raw) - offset:
            raise ValueError(f"a string of {length} bytes is longer than the file")
        found.append(raw[offset : offset + length])
        offset += length
    return found
