"""The gguf package's reader, for files with the vocabularies of today."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader as PackageReader
from gguf import GGUFValueType

_HEAD = 12
"""Bytes before an array's values: their type in 4 and their number in 8."""
_LENGTH = struct.Struct("<Q")


class GGUFReader(PackageReader):  # type: ignore[misc] # the package has no types
    """The package's reader, except that an array of the metadata is read in one go.

    The package makes several views of a memory map for each value, and a tokenizer has hundreds of
    thousands: seconds for what is a part of a second here. `contents` and all else is its own.
    Raises OSError, and ValueError for whatever is no whole GGUF file of this machine's byte order.
    """

    def __init__(self, path: Path) -> None:
        """Read all but the tensors' bytes, which are looked at when they are used."""
        try:
            with np.errstate(all="raise"):
                super().__init__(path)
        # What numbers out of a damaged file lead to: places outside it, sizes beyond 64 bits.
        except (ArithmeticError, LookupError, TypeError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from None

    @property
    def data(self) -> Any:
        """The file's bytes, as a plain array: views of a memory map cost ten times as much."""
        return self._plain

    @data.setter
    def data(self, mapped: Any) -> None:
        self._plain = mapped.view(np.ndarray)

    def _get_field_parts(
        self, orig_offs: int, raw_type: int
    ) -> tuple[int, list[Any], Sequence[int], list[GGUFValueType]]:
        """Return a value's size, its parts, which of them are data, and its types."""
        if self.byte_order != "I":
            raise ValueError("it is of the other byte order")
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
            raise ValueError("an array of arrays")
        size = _HEAD + sum(value.nbytes for value in values)
        if kind[0] == GGUFValueType.STRING:
            size += _LENGTH.size * length
        data = range(2, 2 + len(values))
        return size, [kind, count, *values], data, [GGUFValueType(raw_type), GGUFValueType(kind[0])]


def _strings(data: Any, offset: int, count: int) -> list[Any]:
    """Return the bytes of `count` strings, each after its length."""
    raw, found = memoryview(data), []
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
