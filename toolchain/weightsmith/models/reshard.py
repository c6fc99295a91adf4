"""Split large safetensors files into smaller ones; read files and pieces, and notice changes.

https://huggingface.co/docs/safetensors/index#format

Runtimes download three layers at a time and unpack one while others arrive: where each connection
has its own rate, 512 MiB take 23 to 28 s in one layer and 9 to 11 in eight; 8 GiB at 100 MB/s take
118 s in one and 46 in sixteen. Each layer holds tensors of one file, so a changed file changes only
its own. One size for all would give 70B models hundreds of layers.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from weightsmith.core.errors import EnvironmentFailure, InputRefused, UsageError
from weightsmith.core.safe_parse import INDEX as LARGEST_INDEX
from weightsmith.core.safe_parse import read_json
from weightsmith.core.values import (
    Digest,
    FileEntry,
    JsonValue,
    Pieces,
    Slice,
    Tree,
    Writable,
    canonical,
    key_of,
)
from weightsmith.models.safetensors import SafetensorsHeader, TensorInfo, read_header

INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_SPARE = 64 << 10, 4 << 10
"""Bytes reserved in a layer for tar headers and folders: at most, and at least."""

_CHUNK = 1 << 20

Memo = Callable[[str, Callable[[], str]], str]


@dataclass(frozen=True, slots=True)
class Resharded:
    """A tree with split files, and the content of the new files."""

    tree: Tree
    contents: Mapping[str, Pieces]


def reshard(tree: Tree, largest: int, memo: Memo, *, strict: bool = True) -> Resharded:
    """Return the tree with all safetensors files at most `largest` bytes and a new index.

    Tensors keep their bytes and order; files that fit are unchanged. What cannot be split (a
    single tensor, another format, an adapter) stays larger, or with `strict` raises UsageError.
    """
    large = [file for file in tree.files if file.size > largest - _spare(largest)]
    if not large:
        return Resharded(tree, {})
    weights, metadata = _index(tree)
    listed = set(weights.values())
    whole = [file.path for file in large if file.path not in listed]
    if whole and strict:
        raise UsageError(
            f"{whole[0]} is larger than the maximum layer size",
            hint="split GGUF files with `invoke quantize --split-max-size`"
            if whole[0].endswith(".gguf")
            else "choose a larger --max-layer-size",
        )
    contents: dict[str, Pieces] = {}
    gone: dict[str, Digest] = {}
    for file in large:
        if file.path not in listed:
            continue
        header = read_header(tree.path(file.path))
        groups = _groups(header, largest, strict)
        if len(groups) < 2:  # one tensor that is too large for any file
            continue
        gone[file.path] = file.digest
        for number, group in enumerate(groups, 1):
            stem, count = file.path.removesuffix(".safetensors"), len(groups)
            name = f"{stem}-{number:05d}-of-{count:05d}.safetensors"
            contents[name] = _shard(header, group)
            weights |= {tensor.name: name for tensor in group}
    if not gone:
        return Resharded(tree, {})
    contents[INDEX] = (canonical({"metadata": metadata, "weight_map": weights}),)
    kept = [file for file in tree.files if file.path not in gone and file.path != INDEX]
    made = [_entry(name, pieces, gone, memo, tree.root) for name, pieces in contents.items()]
    files = sorted([*kept, *made], key=lambda file: file.path)
    return Resharded(replace(tree, files=tuple(files)), contents)


def read_pieces(pieces: Pieces) -> Iterator[bytes]:
    """Yield pieces in chunks; raise InputRefused if a file changes."""
    for piece in pieces:
        if isinstance(piece, bytes):
            yield piece
        else:
            yield from _read(piece, None)


def size_of(pieces: Pieces) -> int:
    """Return the total size of pieces in bytes."""
    return sum(len(p) if isinstance(p, bytes) else p.size for p in pieces)


def _groups(header: SafetensorsHeader, largest: int, strict: bool) -> list[list[TensorInfo]]:
    table = 8 + sum(len(t.name) + 256 for t in header.tensors)
    room = largest - _spare(largest) - min(table, largest // 2)
    groups: list[list[TensorInfo]] = [[]]
    used = 0
    for tensor in header.tensors:
        if tensor.size > room and strict:
            raise UsageError(
                f"{header.path.name}: tensor {tensor.name} alone has {tensor.size} bytes, and"
                f" beside its headers a layer of {largest} bytes has room for {max(room, 0)}",
                hint="choose a larger --max-layer-size",
            )
        if groups[-1] and used + tensor.size > room:
            groups.append([])
            used = 0
        groups[-1].append(tensor)
        used += tensor.size
    return groups


def _spare(largest: int) -> int:
    most, least = _SPARE
    return max(least, min(most, largest // 16))


def _shard(header: SafetensorsHeader, group: list[TensorInfo]) -> Pieces:
    start = group[0].start
    table: dict[str, JsonValue] = {
        tensor.name: {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [tensor.start - start, tensor.end - start],
        }
        for tensor in group
    }
    if header.metadata:
        table["__metadata__"] = dict(header.metadata)
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    body = Slice(path=header.path, offset=start, size=group[-1].end - start)
    return (len(text).to_bytes(8, "little") + text, body)


def _index(tree: Tree) -> tuple[dict[str, str], Mapping[str, JsonValue]]:
    """Return the file of each tensor, and the index's metadata. Folders hold other models."""
    if tree.has(INDEX):
        data = read_json(tree.path(INDEX), largest=LARGEST_INDEX)
        places = data.get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(p, str) for p in places.values()):
            raise InputRefused(
                f"{tree.path(INDEX)} has no weight_map", hint="download the index again"
            )
        return dict(places), data.get("metadata") or {}
    names = [f.path for f in tree.files if f.path.endswith(".safetensors") and "/" not in f.path]
    if _SINGLE in names:  # without an index, loaders read no other
        names = [_SINGLE]
    headers = [read_header(tree.path(name)) for name in names]
    total = sum(tensor.size for header in headers for tensor in header.tensors)
    weights = {t.name: header.path.name for header in headers for t in header.tensors}
    return weights, {"total_size": total}


def _entry(
    name: str, pieces: Pieces, sources: Mapping[str, Digest], memo: Memo, root: Path
) -> FileEntry:
    def hashed() -> str:
        state = hashlib.sha256()
        for chunk in read_pieces(pieces):
            state.update(chunk)
        return f"sha256:{state.hexdigest()}"

    data: list[Writable] = [
        Digest.of(p) if isinstance(p, bytes)
        else [sources[p.path.relative_to(root).as_posix()], p.offset, p.size]
        for p in pieces
    ]  # fmt: skip
    digest = Digest(memo(key_of(["pieces", data]), hashed))
    return FileEntry(path=name, size=size_of(pieces), digest=digest)


def read_file(source: Path, size: int) -> Iterator[bytes]:
    """Yield a regular file in chunks; raise InputRefused if its size differs or it changes."""
    return _read(Slice(path=source, offset=0, size=size), size)


def _read(part: Slice, size: int | None) -> Iterator[bytes]:
    try:
        # O_NONBLOCK, because opening a pipe would block forever.
        handle = os.open(part.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(handle, "rb", buffering=0) as file:
            before = os.fstat(file.fileno())
            if not stat.S_ISREG(before.st_mode) or size not in (None, before.st_size):
                raise _changed(part.path)
            file.seek(part.offset)
            left = part.size
            while left and (chunk := file.read(min(_CHUNK, left))):
                left -= len(chunk)
                yield chunk
            after = os.fstat(file.fileno())
            if left or (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
                raise _changed(part.path)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise _changed(part.path) from None
    except OSError as error:
        raise EnvironmentFailure(
            f"cannot read {part.path}: {error.strerror}", hint="check the disk and the permissions"
        ) from None


def _changed(source: Path) -> InputRefused:
    return InputRefused(
        f"{source} changed while it was added to the image",
        hint="stop the process that writes to it, then build again",
    )
