"""Headers of GGUF files as bytes: read, and written as llama-quantize writes them."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

ALIGNMENT = 32
"""Every tensor starts at a multiple of this (GGUF_DEFAULT_ALIGNMENT)."""
_MAGIC, _VERSION = b"GGUF", 3
_STRING, _ARRAY, _UINT16, _UINT32, _INT32 = 8, 9, 2, 4, 5
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a value by its type's number (gguf.h's gguf_type)."""
_VERSION_OF_BLOCKS = 2
"""ggml.h's GGML_QNT_VERSION."""
SPLIT_KEYS = ("split.no", "split.count", "split.tensors.count")


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufTensorInfo:
    """A tensor of a header."""

    name: str
    shape: tuple[int, ...]
    """Row length first."""
    kind: int
    """llama.cpp's number of the type."""
    offset: int
    """Bytes after the header."""

    @property
    def columns(self) -> int:
        """Weights per row."""
        return self.shape[0]

    @property
    def rows(self) -> int:
        """Rows of all matrices."""
        return math.prod(self.shape[1:])


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufHeader:
    """Values as type and bytes, tensors, and where their data starts."""

    values: Mapping[str, bytes]
    tensors: Mapping[str, GgufTensorInfo]
    size: int


def read_header(path: Path) -> GgufHeader:
    """Return a file's header; raises ValueError unless it is GGUF of this version."""
    with path.open("rb") as file:
        if file.read(4) != _MAGIC or _number(file, "I") != _VERSION:
            raise ValueError(f"{path.name} is not a GGUF file of version {_VERSION}")
        count, keys = _number(file, "Q"), _number(file, "Q")
        values, tensors = dict[str, bytes](), dict[str, GgufTensorInfo]()
        for _ in range(keys):
            key, start = _text(file), file.tell()
            _skip(file, _number(file, "I"))
            end = file.tell()
            file.seek(start)
            values[key] = _read(file, end - start)
        for _ in range(count):
            name = _text(file)
            shape = tuple(_number(file, "Q") for _ in range(_number(file, "I")))
            kind, offset = _number(file, "I"), _number(file, "Q")
            tensors[name] = GgufTensorInfo(name=name, shape=shape, kind=kind, offset=offset)
        size = file.tell()
    return GgufHeader(values=values, tensors=tensors, size=_padded(size))


def split_values(number: int, count: int, tensors: int) -> dict[str, bytes]:
    """Return what a part of a split model says of itself, as llama-gguf-split writes it."""
    return {
        "split.no": struct.pack("<IH", _UINT16, number),
        "split.count": struct.pack("<IH", _UINT16, count),
        "split.tensors.count": struct.pack("<Ii", _INT32, tensors),
    }


def quantized(
    header: GgufHeader, targets: Mapping[str, tuple[int, int]], changes: Mapping[str, bytes]
) -> tuple[bytes, Mapping[str, int]]:
    """Return the bytes that llama-quantize writes before the data, and each tensor's offset.

    `targets` are the tensors in order: name -> type's number and bytes. `changes` are values that
    replace the header's, at the end.
    """
    values = {k: v for k, v in header.values.items() if k not in (*changes, *SPLIT_KEYS)}
    split = {k: header.values[k] for k in SPLIT_KEYS if k in header.values}
    # Only the first part of a split model has values of the model.
    values = {**values, **changes, **split} if len(values) or not split else split
    offsets, described = placed(targets, 0), []
    for name, (kind, _) in targets.items():
        shape = list(header.tensors[name].shape)
        while len(shape) > 1 and shape[-1] == 1:  # as ggml_n_dims counts
            shape.pop()
        layout = f"<I{len(shape)}QIQ"
        numbers = struct.pack(layout, len(shape), *shape, kind, offsets[name])
        described.append(_string(name) + numbers)
    start = [_MAGIC, struct.pack("<IQQ", _VERSION, len(targets), len(values))]
    keys = [_string(key) + value for key, value in values.items()]
    data = b"".join([*start, *keys, *described])
    data += bytes(_padded(len(data)) - len(data))
    return data, {name: len(data) + offset for name, offset in offsets.items()}


def placed(targets: Mapping[str, tuple[int, int]], start: int) -> Mapping[str, int]:
    """Return each tensor's offset in a file whose data starts at `start`."""
    offsets, end = dict[str, int](), start
    for name, (_, size) in targets.items():
        offsets[name] = end
        end += _padded(size)
    return offsets


def changed_values(file_type: int, overrides: Mapping[str, str | int]) -> dict[str, bytes]:
    """Return the values that llama-quantize sets: version, file type, then the overrides."""
    about = {
        "general.quantization_version": uint32(_VERSION_OF_BLOCKS),
        "general.file_type": uint32(file_type),
    }
    for key, value in overrides.items():
        about.pop(key, None)
        text = struct.pack("<I", _STRING) + _string(str(value))
        about[key] = uint32(value) if isinstance(value, int) else text
    return about


def uint32(value: int) -> bytes:
    """Return a value of this type."""
    return struct.pack("<II", _UINT32, value)


def strings(value: bytes) -> list[str]:
    """Return the strings of an array's value; raises ValueError for other types."""
    kind, of, count = struct.unpack_from("<IIQ", value)
    if (kind, of) != (_ARRAY, _STRING):
        raise ValueError("not an array of strings")
    found, at = [], 16
    for _ in range(count):
        (length,) = struct.unpack_from("<Q", value, at)
        found.append(value[at + 8 : at + 8 + length].decode("utf-8"))
        at += 8 + length
    return found


def number(value: bytes) -> int:
    """Return a value of type uint32; raises ValueError for other types."""
    kind, found = struct.unpack("<II", value)
    if kind != _UINT32:
        raise ValueError("not a number of 32 bits")
    return int(found)


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _string(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def _read(file: IO[bytes], size: int) -> bytes:
    data = file.read(size)
    if len(data) != size:
        raise ValueError("the file ends inside its header")
    return data


def _number(file: IO[bytes], kind: str) -> int:
    return int(struct.unpack(f"<{kind}", _read(file, struct.calcsize(kind)))[0])


def _text(file: IO[bytes]) -> str:
    return _read(file, _number(file, "Q")).decode("utf-8")


def _skip(file: IO[bytes], kind: int) -> None:
    if kind == _STRING:
        file.seek(_number(file, "Q"), 1)
    elif kind == _ARRAY:
        of, count = _number(file, "I"), _number(file, "Q")
        if of in _SIZES:
            file.seek(_SIZES[of] * count, 1)
            return
        for _ in range(count):
            _skip(file, of)
    elif kind in _SIZES:
        file.seek(_SIZES[kind], 1)
    else:
        raise ValueError(f"unknown type {kind} of a value")


def is_whole(path: Path) -> bool:
    """Return whether a GGUF file of float32 is there, with the data of all its tensors."""
    try:
        header = read_header(path)
    except (OSError, ValueError):
        return False
    ends = (4 * one.rows * one.columns + one.offset for one in header.tensors.values())
    return path.stat().st_size >= header.size + max(ends, default=0)
