"""Cut a checkpoint into files whose tensors change together; read files and pieces of them.

https://huggingface.co/docs/safetensors/index#format

A file becomes a layer, and a registry or a node that has a layer gets it no second time. An adapter
changes some kinds of matrices, such as `q_proj` and `v_proj`, in all layers of a model. So a file
has one kind of matrix, in the order of the model's layers, and its name and end depend only on the
names, types and sizes of the tensors: fine-tunes of one base share all files of the kinds that they
leave as they are, whichever adapters they had, in every form of the image.

Runtimes download three layers at a time and unpack one while others arrive: where each connection
has its own rate, 512 MiB take 23 to 28 s in one layer and 9 to 11 in eight; 8 GiB at 100 MB/s take
118 s in one and 46 in sixteen. One size for all would give 70B models hundreds of layers.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeAlias, TypeVar

from weightsmith.core.errors import EnvironmentFailure, InputRefused, UsageError
from weightsmith.core.json_objects import JsonObject
from weightsmith.core.safe_parse import INDEX as LARGEST_INDEX
from weightsmith.core.safe_parse import read_json
from weightsmith.core.values import (
    Digest,
    FileEntry,
    JsonValue,
    Pieces,
    Slice,
    Stream,
    Tree,
    Writable,
    canonical,
    key_of,
)
from weightsmith.models.safetensors import BITS, TensorInfo, build_header, read_header

INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
CACHE_SCALES = "kv-cache-scales.safetensors"
"""Scales of a cache, measured on the merged model: a file of its own, so that others stay equal."""
_SPARE = 64 << 10, 4 << 10
"""Bytes reserved in a layer for tar headers and folders: at most, and at least."""
WORTH_IT = 1 << 20
"""Bytes of weights from which a checkpoint is cut: below, there would be more headers than data."""
_SHARE, _LEAST = 1024, 16 << 10
"""Kinds with less than this share of the weights, or less bytes, are in one file together."""
_MOST_KINDS = 20
"""Kinds with files of their own; the others, which are smaller, are together. So a model that is
split into 32 files for its size has few enough for an image."""
_TOGETHER = "rest"
HASHED_AT_ONCE = 4
"""Files; hashing leaves the interpreter to other threads."""
_CHUNK = 1 << 20

_PARAMETER = re.compile(r"\.(?:weight|bias|qweight|qzeros|scales|g_idx|input)(?:_\w+)?$")
"""What a matrix consists of, plain or packed: it changes as a whole."""
_PLAIN = re.compile(r"[A-Za-z0-9_.-]{1,100}")
_MISREAD = re.compile(r"adapter|args|arguments|training|optimizer|consolidated", re.IGNORECASE)
"""Words in a file's name that make loaders leave it out: TGI's `_weight_files_from_dir` does."""

Memo = Callable[[str, Callable[[], str]], str]


class Tensor(Protocol):
    """What decides a tensor's place."""

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def dtype(self) -> str:
        """Its safetensors dtype."""

    @property
    def size(self) -> int:
        """Its size in bytes."""


T = TypeVar("T", bound=Tensor)


@dataclass(frozen=True, slots=True)
class Resharded:
    """A tree with other weights files, and the content of these."""

    tree: Tree
    contents: Mapping[str, Pieces | Stream]
    tensors: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Names of the tensors of each file that was cut."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightBytes(JsonObject):
    """How many bytes of an image's weights are in files that other images have too."""

    shared_bytes: int
    """In files that every image of this base and format has, whichever adapters were merged."""
    own_bytes: int
    """In files with tensors that depend on the adapters, or were added by them."""


def reshard(
    tree: Tree, largest: Callable[[int], int], memo: Memo, *, strict: bool = True
) -> Resharded:
    """Return the tree with its model's weights in the files of `cut`, and a new index.

    Tensors keep their bytes. `largest` gets the bytes of the model's layers and returns the limit
    of a file with its layer. What cannot be cut (a single tensor, another format, an adapter) stays
    larger, or with `strict` raises UsageError. Less than 1 MiB stays as it is if it fits.
    """
    try:
        weights, metadata = _index(tree)
        found = _tensors(tree, weights)
    except InputRefused:
        if strict:
            raise
        return Resharded(tree, {})  # whoever gave it was told
    limit = largest(repeated_bytes(tensor for _, tensor in found.values()))
    listed = set(weights.values()) - {CACHE_SCALES}
    large = {file.path for file in tree.files if file.size > limit - _spare(limit)}
    if strict and (whole := sorted(large - listed)):
        raise UsageError(
            f"{whole[0]} is larger than the maximum layer size",
            hint="split GGUF files with `invoke quantize --split-max-size`"
            if whole[0].endswith(".gguf")
            else "choose a larger --max-layer-size",
        )
    total = sum(tensor.size for _, tensor in found.values())
    if not found or (total < WORTH_IT and not large & listed):
        return Resharded(tree, {})
    weights = {tensor: name for tensor, name in weights.items() if name not in listed}
    parts: dict[str, _Parts] = {}
    tensors: dict[str, tuple[str, ...]] = {}
    for name, group in cut([tensor for _, tensor in found.values()], limit, strict=strict).items():
        parts[name] = _parts_of([found[tensor.name] for tensor in group])
        tensors[name] = tuple(tensor.name for tensor in group)
        weights |= dict.fromkeys(tensors[name], name)
    parts[INDEX] = (canonical({"metadata": metadata, "weight_map": weights}),)
    contents = {name: _content(tree, some) for name, some in parts.items()}
    digests = {file.path: file.digest for file in tree.files if file.path in listed}
    sizes = {file.path: file.size for file in tree.files}

    def entry(name: str) -> FileEntry:
        if whole := _whole(tree, parts[name], sizes):  # as in a base that is an image of ours
            return FileEntry(path=name, size=sizes[whole], digest=digests[whole])
        data: list[Writable] = [
            Digest.of(part) if isinstance(part, bytes) else [digests[part[0]], *part[1:]]
            for part in parts[name]
        ]
        digest = memo(key_of(["pieces", data]), lambda: _hashed(contents[name]))
        size = sum(len(part) if isinstance(part, bytes) else part[2] for part in parts[name])
        return FileEntry(path=name, size=size, digest=Digest(digest))

    with ThreadPoolExecutor(HASHED_AT_ONCE) as pool:
        made = list(pool.map(entry, parts))
    kept = [file for file in tree.files if file.path not in listed | parts.keys()]
    files = tuple(sorted([*kept, *made], key=lambda file: file.path))
    return Resharded(_CutTree(files, tree), contents, tensors)


def cut(tensors: Iterable[T], limit: int, *, strict: bool = False) -> dict[str, list[T]]:
    """Return the files for tensors, by name, each with its tensors in order.

    `limit` is that of a file with its layer, in bytes. With `strict`, raises UsageError for a
    tensor that is larger; without, it is alone in its file.
    """
    kinds: dict[str, list[T]] = {}
    for tensor in sorted(tensors, key=lambda one: _natural(one.name)):
        kinds.setdefault(kind_of(tensor.name), []).append(tensor)
    sizes = {kind: sum(tensor.size for tensor in group) for kind, group in kinds.items()}
    # What has no layer's number may be added by an adapter: it must not move the others.
    least = max(_LEAST, repeated_bytes(t for group in kinds.values() for t in group) // _SHARE)
    ranked = sorted(sizes, key=lambda kind: (-sizes[kind], kind))
    apart = {kind for kind in ranked[:_MOST_KINDS] if sizes[kind] >= least}
    groups = {label: kinds[kind] for kind, label in _labels(apart).items()}
    if rest := [tensor for kind, group in kinds.items() if kind not in apart for tensor in group]:
        groups[_TOGETHER] = rest
    return {
        f"model-{label}-{number:03}.safetensors": sorted(part, key=lambda one: -BITS[one.dtype])
        for label, group in groups.items()
        for number, part in enumerate(_parts(group, limit, strict=strict), 1)
    }


def module_of(name: str) -> str:
    """Return the module of a tensor, or the tensor itself if it is not a part of a matrix."""
    return _PARAMETER.sub("", name)


def repeated_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of all tensors that have a layer's number in their names; else of all."""
    every = list(tensors)
    numbered = sum(one.size for one in every if is_numbered(one.name))
    return numbered or sum(one.size for one in every)


def is_numbered(name: str) -> bool:
    """Return whether a name has a layer's number."""
    return any(part.isdecimal() for part in name.split("."))


def read_pieces(pieces: Pieces) -> Iterator[bytes]:
    """Yield pieces in chunks; raise InputRefused if a file changes."""
    for piece in pieces:
        if isinstance(piece, bytes):
            yield piece
        else:
            yield from _read(piece, None)


def beginning_of(content: Path | Pieces | Stream, most: int) -> Digest:
    """Return the digest of a content's first bytes, at most so many."""
    if isinstance(content, Path):
        content = (Slice(path=content, offset=0, size=min(most, content.stat().st_size)),)
    state, left = hashlib.sha256(), most
    for chunk in content.open() if isinstance(content, Stream) else read_pieces(content):
        state.update(chunk[:left])
        left -= len(chunk)
        if left <= 0:
            break
    return Digest(f"sha256:{state.hexdigest()}")


def size_of(pieces: Pieces) -> int:
    """Return the total size of pieces in bytes."""
    return sum(len(p) if isinstance(p, bytes) else p.size for p in pieces)


def kind_of(name: str) -> str:
    """Return what a module has in common with the same one of other layers and experts."""
    parts = module_of(name).split(".")
    return ".".join("N" if part.isdecimal() else part for part in parts)


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Return a key that sorts layer 2 before layer 10."""
    return [(1, int(p), p) if p.isdecimal() else (0, 0, p) for p in name.split(".")]


def _labels(kinds: Iterable[str]) -> dict[str, str]:
    """Return a part of a file's name for each kind: itself, or its digest if it is none."""
    plain = {kind: kind.replace(".N.", ".").removeprefix("model.") for kind in kinds}
    often = Counter(label.lower() for label in plain.values())
    return {
        kind: label
        if _PLAIN.fullmatch(label)
        and not _MISREAD.search(label)
        and often[label.lower()] == 1
        and label != _TOGETHER
        else key_of(["kind", kind]).hex[:16]
        for kind, label in plain.items()
    }


def _parts(group: list[T], limit: int, *, strict: bool) -> list[list[T]]:
    table = 8 + sum(len(tensor.name) + 256 for tensor in group)
    room = limit - _spare(limit) - min(table, limit // 2)
    parts: list[list[T]] = [[]]
    used = 0
    for tensor in group:
        if tensor.size > room and strict:
            raise UsageError(
                f"tensor {tensor.name} alone has {tensor.size} bytes, and beside its headers a"
                f" layer of {limit} bytes has room for {max(room, 0)}",
                hint="choose a larger --max-layer-size",
            )
        if parts[-1] and used + tensor.size > room:
            parts.append([])
            used = 0
        parts[-1].append(tensor)
        used += tensor.size
    return parts


def _spare(largest: int) -> int:
    most, least = _SPARE
    return max(least, min(most, largest // 16))


_Parts: TypeAlias = tuple[bytes | tuple[str, int, int], ...]
"""A file's bytes: given, or by name, offset and size in the files that there are."""


def _parts_of(group: list[tuple[str, TensorInfo]]) -> _Parts:
    tensors = [(tensor.name, tensor.dtype, tensor.shape) for _, tensor in group]
    parts: list[bytes | tuple[str, int, int]] = [build_header(tensors, {"format": "pt"})]
    for name, tensor in group:
        last = parts[-1]
        if isinstance(last, tuple) and (last[0], last[1] + last[2]) == (name, tensor.start):
            parts[-1] = (name, last[1], last[2] + tensor.size)
        elif tensor.size:
            parts.append((name, tensor.start, tensor.size))
    return tuple(parts)


def _content(tree: Tree, parts: _Parts) -> Pieces | Stream:
    """Return where a file's bytes come from; what is on another machine is fetched when read."""

    def pieces() -> Pieces:
        return tuple(
            part
            if isinstance(part, bytes)
            else Slice(path=tree.path(part[0]), offset=part[1], size=part[2])
            for part in parts
        )

    names = {part[0] for part in parts if not isinstance(part, bytes)}
    if any(isinstance(tree.source(name), Stream) for name in names):
        return Stream(open=lambda: read_pieces(pieces()))
    return pieces()


def _whole(tree: Tree, parts: _Parts, sizes: Mapping[str, int]) -> str:
    """Return the file that consists of these parts already; "" if none does."""
    match parts:
        case (bytes() as header, (str() as name, int(start), int(size))):
            if start == len(header) and start + size == sizes[name]:
                with tree.header(name).open("rb") as file:
                    return name if file.read(start) == header else ""
        case _:
            pass
    return ""


def _hashed(content: Pieces | Stream) -> str:
    state = hashlib.sha256()
    for chunk in content.open() if isinstance(content, Stream) else read_pieces(content):
        state.update(chunk)
    return f"sha256:{state.hexdigest()}"


class _CutTree(Tree):
    """Other files of a tree; those that were not cut are where they were."""

    __slots__ = ("_whole",)
    _whole: Tree

    def __init__(self, files: tuple[FileEntry, ...], whole: Tree) -> None:
        object.__setattr__(self, "_whole", whole)
        object.__setattr__(self, "files", files)
        object.__setattr__(self, "places", whole.places)

    def __repr__(self) -> str:
        return f"_CutTree({len(self.files)} files)"

    @property
    def root(self) -> Path:
        return self._whole.root

    @property
    def texts(self) -> Path:
        return self._whole.texts

    def path(self, name: str) -> Path:
        return self._whole.path(name)

    def source(self, name: str) -> Path | Stream:
        return self._whole.source(name)

    def header(self, name: str) -> Path:
        return self._whole.header(name)

    def mode(self, name: str) -> int:
        return self._whole.mode(name)


def _tensors(tree: Tree, weights: Mapping[str, str]) -> dict[str, tuple[str, TensorInfo]]:
    """Return each tensor with its file; of one that two files have, that which the index names."""
    found: dict[str, tuple[str, TensorInfo]] = {}
    for name in sorted(set(weights.values()) - {CACHE_SCALES}):
        if not tree.has(name):
            raise InputRefused(
                f"{INDEX} names {name}, which is not there", hint="download the model again"
            )
        for tensor in read_header(tree.header(name)).tensors:
            if weights.get(tensor.name, name) == name:
                found[tensor.name] = name, tensor
    return found


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
    if _SINGLE in names:  # without an index, transformers reads no other, and vLLM every one
        names = [name for name in names if name in (_SINGLE, CACHE_SCALES)]
    found = [(name, t) for name in names for t in read_header(tree.header(name)).tensors]
    weights = {tensor.name: name for name, tensor in found}
    return weights, {"total_size": sum(tensor.size for _, tensor in found)}


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
