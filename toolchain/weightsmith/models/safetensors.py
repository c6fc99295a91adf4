"""Strict reader of safetensors headers: every offset is checked before it is used."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeGuard

from weightsmith.core.errors import InputRefused
from weightsmith.core.safe_parse import INDEX, json_object, read_json
from weightsmith.core.values import JsonValue
from weightsmith.models.folder import is_ignored

MAX_HEADER_BYTES = 100_000_000
"""The safetensors crate's limit."""

BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}
"""Bits per element of every dtype of safetensors 0.8."""

NO_DATA = {"format": "no"}
"""Metadata of a file that is a header alone. They are as long as those of other files (`pt`), so
offsets are theirs. Its types are in lower case, so that every library refuses it."""

_HINT = "the file is damaged or incomplete; download or export it again and compare its sha256"
_MAX_NAME = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """A tensor in a file; `start` and `end` are byte offsets from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def size(self) -> int:
        """Size in bytes."""
        return self.end - self.start


@dataclass(frozen=True, slots=True, kw_only=True)
class SafetensorsHeader:
    """A file's header; tensors are in file order."""

    path: Path
    tensors: tuple[TensorInfo, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)
    file_size: int = 0
    """Bytes; of a file without data, those of the file that it stands for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointIndex:
    """All tensors of a checkpoint folder, shard by shard."""

    root: Path
    shards: tuple[SafetensorsHeader, ...]
    index_file: str
    """Name of the index file; empty for a single file."""

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor by name."""
        return {info.name: info for shard in self.shards for info in shard.tensors}


def read_header(path: Path) -> SafetensorsHeader:
    """Return the header of a file; its tensors must cover the data without gaps or overlaps.

    Raises InputRefused for everything that the safetensors crate refuses, and for names that are
    duplicate, empty or have control characters. The format allows unaligned tensors.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little") if size >= 8 else -1
            if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
                raise _refuse(path, f"invalid header size {length} in a file of {size} bytes")
            text = file.read(length)
    except OSError as error:
        raise InputRefused(
            f"{path} cannot be read: {error.strerror}", hint="check the path and its permissions"
        ) from error
    if len(text) != length:
        raise _refuse(path, "it is truncated within the header")
    table = json_object(text, str(path), largest=MAX_HEADER_BYTES, unique=True)
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(t, str) for t in metadata.values()):
        raise _refuse(path, "__metadata__ is not an object of strings")
    if metadata == NO_DATA:
        for entry in table.values():
            if isinstance(entry, dict) and isinstance(dtype := entry.get("dtype"), str):
                entry["dtype"] = dtype.upper()
    infos = [_tensor(path, name, entry, 8 + length) for name, entry in table.items()]
    infos.sort(key=lambda info: (info.start, info.end))
    if metadata == NO_DATA and size == 8 + length:
        size = infos[-1].end if infos else size
    end = 8 + length
    for info in infos:
        if info.start != end:
            what = "overlaps the previous one" if info.start < end else "has a gap before it"
            raise _refuse(path, f"tensor {info.name!r} {what}")
        end = info.end
    if end != size:
        what = "truncated" if size < end else "followed by extra bytes"
        raise _refuse(path, f"the data should end at byte {end}, but is {what} at {size}")
    return SafetensorsHeader(path=path, tensors=tuple(infos), metadata=metadata, file_size=size)


def header_bytes(chunks: Iterable[bytes]) -> bytes:
    """Return what a file begins with, up to its tensors or the end; reads no more than that."""
    found = b""
    for chunk in chunks:
        found += chunk
        end = 8 + int.from_bytes(found[:8], "little")
        if len(found) >= min(end, MAX_HEADER_BYTES + 8):
            return found[:end]
    return found


def open_checkpoint(root: Path) -> CheckpointIndex:
    """Return the index of `model.safetensors`, or of the shards in `model.safetensors.index.json`.

    An index of a single file is read like any other. Shards are sorted by name. Raises
    InputRefused if index and headers disagree.
    """
    single, index = root / "model.safetensors", root / "model.safetensors.index.json"
    both = single.exists() and index.exists()
    if both and set(_weight_map(index).values()) != {single.name}:
        raise InputRefused(
            f"{root} has both {single.name} and {index.name}",
            hint="remove the outdated one",
        )
    if single.exists() and not both:
        return CheckpointIndex(root=root, shards=(read_header(single),), index_file="")
    if not index.exists():
        raise InputRefused(
            f"{root} has neither {single.name} nor {index.name}",
            hint="give the folder of a Hugging Face checkpoint in safetensors form",
        )
    weight_map = _weight_map(index)
    shards = tuple(read_header(root / name) for name in sorted(set(weight_map.values())))
    found: dict[str, str] = {}
    for shard in shards:
        for info in shard.tensors:
            if info.name in found:
                raise _refuse(
                    index,
                    f"duplicate tensor {info.name!r} in {found[info.name]} and {shard.path.name}",
                )
            found[info.name] = shard.path.name
    for name in sorted(found.keys() | weight_map.keys()):
        if found.get(name) != weight_map.get(name):
            raise _refuse(
                index,
                f"{name!r} should be in {weight_map.get(name, 'no shard')}"
                f" but is in {found.get(name, 'no shard')}",
            )
    return CheckpointIndex(root=root, shards=shards, index_file=index.name)


def build_header(
    tensors: Iterable[tuple[str, str, Sequence[int]]], metadata: Mapping[str, str]
) -> bytes:
    """Return length prefix and header for tensors (name, dtype, shape) in this order.

    The header is padded with spaces to a multiple of 8 bytes, as in the format's specification.
    """
    table: dict[str, JsonValue] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, dtype, shape in tensors:
        end = offset + math.prod(shape) * BITS[dtype] // 8
        shown = dtype.lower() if metadata == NO_DATA else dtype
        table[name] = {"dtype": shown, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _tensor(path: Path, name: str, entry: JsonValue, data_start: int) -> TensorInfo:
    # Lone surrogates are not printable either, so accepted names can be shown and encoded.
    if not name or len(name) > _MAX_NAME or not name.isprintable():
        raise _refuse(path, f"invalid tensor name {name[:80]!r}: empty, too long or not printable")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _refuse(path, f"tensor {name!r} must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise _refuse(path, f"tensor {name!r} has the unknown dtype {dtype!r}")
    if not _is_naturals(shape) or not _is_naturals(offsets) or len(offsets) != 2:
        raise _refuse(
            path, f"tensor {name!r} has an invalid shape {shape!r} or offsets {offsets!r}"
        )
    bits, length = math.prod(shape) * BITS[dtype], offsets[1] - offsets[0]
    if bits % 8 or bits // 8 != length:
        raise _refuse(
            path, f"tensor {name!r} of dtype {dtype} and shape {shape} cannot have {length} bytes"
        )
    return TensorInfo(
        name=name,
        dtype=dtype,
        shape=tuple(shape),
        start=data_start + offsets[0],
        end=data_start + offsets[1],
    )


def _is_naturals(value: JsonValue) -> TypeGuard[list[int]]:
    # Below 2**63 like file offsets; bool is an int in Python, but not in JSON.
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 63 for n in value)


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index, largest=INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise _refuse(index, "it has no valid weight_map")
    for tensor, name in weight_map.items():
        if (
            not isinstance(name, str)
            or not name.endswith(".safetensors")
            or not name.isprintable()
            or Path(name).name != name
            or is_ignored(name)
        ):
            raise _refuse(index, f"{tensor!r} is mapped to the invalid file name {name!r}")
    return weight_map


def _refuse(path: Path, what: str) -> InputRefused:
    return InputRefused(f"{path} is not a valid checkpoint file: {what}", hint=_HINT)
