"""Safetensors headers, read strictly: no byte of a file is trusted before its place is proven."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weightsmith.errors import InputRefused
from weightsmith.foreign import INDEX, json_object, read_json

MAX_HEADER_BYTES = 100_000_000
"""The safetensors crate's own limit."""

BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}
"""Bits per element of every type that safetensors 0.8 knows."""

_AGAIN = "the file is damaged or incomplete; download or export it again and compare its sha256"
_MAX_NAME = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """One tensor of a file: `start` and `end` are offsets from the start of the file, in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def size(self) -> int:
        """Bytes."""
        return self.end - self.start


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """A file's table of contents; tensors are in the order of their bytes."""

    path: Path
    tensors: tuple[TensorInfo, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)
    file_size: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointIndex:
    """All tensors of a checkpoint folder, shard by shard."""

    root: Path
    shards: tuple[Header, ...]
    index_file: str
    """Name of the index, or empty for a single file."""

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor by name."""
        return {info.name: info for shard in self.shards for info in shard.tensors}


def read_header(path: Path) -> Header:
    """Return the header of a file whose tensors tile it exactly, without gap or overlap.

    Raises InputRefused for whatever the safetensors crate refuses, and besides for names that
    repeat, are empty or hold control characters. Unaligned tensors are legal in the format.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little") if size >= 8 else -1
            if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
                raise _refuse(path, f"its header of {length} bytes does not fit {size} bytes")
            text = file.read(length)
    except OSError as error:
        raise InputRefused(
            f"{path} cannot be read: {error.strerror}", hint="check the path and its permissions"
        ) from error
    if len(text) != length:
        raise _refuse(path, "it ends within its header")
    table = json_object(text, str(path), largest=MAX_HEADER_BYTES, unique=True)
    metadata = _metadata(path, table.pop("__metadata__", {}))
    infos = [_tensor(path, name, entry, 8 + length) for name, entry in table.items()]
    infos.sort(key=lambda info: (info.start, info.end))
    _check_tiling(path, infos, 8 + length, size)
    return Header(path=path, tensors=tuple(infos), metadata=metadata, file_size=size)


def open_checkpoint(root: Path) -> CheckpointIndex:
    """Return the index of `model.safetensors`, or of the shards that its `.index.json` names.

    Shards come in the order of their names. Raises InputRefused where index and headers disagree.
    """
    single, index = root / "model.safetensors", root / "model.safetensors.index.json"
    if single.exists() and index.exists():
        raise InputRefused(
            f"{root} holds both {single.name} and {index.name}: it is unclear which one counts",
            hint="remove the one that is stale",
        )
    if single.exists():
        return CheckpointIndex(root=root, shards=(read_header(single),), index_file="")
    if not index.exists():
        raise InputRefused(
            f"{root} has neither {single.name} nor {index.name}",
            hint="give the folder of a Hugging Face checkpoint in safetensors form",
        )
    weight_map = _weight_map(index)
    shards = tuple(read_header(root / name) for name in sorted(set(weight_map.values())))
    _check_shards(index, weight_map, shards)
    return CheckpointIndex(root=root, shards=shards, index_file=index.name)


def build_header(
    tensors: Iterable[tuple[str, str, Sequence[int]]], metadata: Mapping[str, str]
) -> bytes:
    """Return length and header of a file that holds (name, dtype, shape) in this order.

    The header is padded with spaces to a multiple of 8 bytes, as the format asks.
    """
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, dtype, shape in tensors:
        end = offset + math.prod(shape) * BITS[dtype] // 8
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _metadata(path: Path, value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise _refuse(path, "its __metadata__ is not a table of strings")
    return value


def _tensor(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    """Check one entry of the table by itself."""
    _check_name(path, name)
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _refuse(path, f"tensor {name!r} lacks dtype, shape or data_offsets, or has more")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise _refuse(path, f"tensor {name!r} has the unknown type {dtype!r}")
    if not _is_naturals(shape) or not _is_naturals(offsets) or len(offsets) != 2:
        raise _refuse(path, f"tensor {name!r} has a bad shape {shape!r} or offsets {offsets!r}")
    bits, length = math.prod(shape) * BITS[dtype], offsets[1] - offsets[0]
    if bits % 8 or bits // 8 != length:
        raise _refuse(
            path, f"tensor {name!r} of type {dtype} and shape {shape} cannot be {length} bytes"
        )
    return TensorInfo(
        name=name,
        dtype=dtype,
        shape=tuple(shape),
        start=data_start + offsets[0],
        end=data_start + offsets[1],
    )


def _is_naturals(value: Any) -> bool:
    # Below 2**63, as any file offset; a bool is an int in Python, but not in JSON.
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 63 for n in value)


def _check_name(path: Path, name: str) -> None:
    # Lone surrogates are "not printable" too, so what passes can be shown and encoded.
    if not name or len(name) > _MAX_NAME or not name.isprintable():
        raise _refuse(path, f"the tensor name {name[:80]!r} is empty, too long or not printable")


def _check_tiling(path: Path, infos: list[TensorInfo], start: int, size: int) -> None:
    for info in infos:
        if info.start != start:
            what = "overlaps its neighbour" if info.start < start else "leaves a gap before it"
            raise _refuse(path, f"tensor {info.name!r} {what}")
        start = info.end
    if start != size:
        what = "cut off" if size < start else "followed by bytes that no tensor owns"
        raise _refuse(path, f"the data, which should end at byte {start}, is {what} at {size}")


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index, largest=INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise _refuse(index, "it has no weight_map")
    for tensor, name in weight_map.items():
        if (
            not isinstance(name, str)
            or not name.endswith(".safetensors")
            or not name.isprintable()
            or Path(name).name != name
        ):
            raise _refuse(
                index, f"it puts {tensor!r} into {name!r}, which is no file of the folder"
            )
    return weight_map


def _check_shards(index: Path, weight_map: Mapping[str, str], shards: Sequence[Header]) -> None:
    """Check that index and headers tell the same, both ways."""
    found: dict[str, str] = {}
    for shard in shards:
        for info in shard.tensors:
            if info.name in found:
                raise _refuse(
                    index, f"{info.name!r} is in {found[info.name]} and in {shard.path.name}"
                )
            found[info.name] = shard.path.name
    for name in sorted(found.keys() | weight_map.keys()):
        if found.get(name) != weight_map.get(name):
            raise _refuse(
                index,
                f"{name!r} should be in {weight_map.get(name, 'no shard')}"
                f" but is in {found.get(name, 'no shard')}",
            )


def _refuse(path: Path, what: str) -> InputRefused:
    return InputRefused(f"{path} is not a valid checkpoint file: {what}", hint=_AGAIN)
