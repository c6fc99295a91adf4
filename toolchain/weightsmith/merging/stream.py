"""Read and write shards block by block: positioned reads, hashed and atomically renamed files."""

from __future__ import annotations

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from weightsmith.core.errors import EnvironmentFailure, InputRefused
from weightsmith.core.files import sync_folder
from weightsmith.core.small_floats import as_float
from weightsmith.core.values import JsonValue
from weightsmith.merging.libc import reserve
from weightsmith.merging.native import sum_words
from weightsmith.merging.outputs import MatrixView, StoredTensor
from weightsmith.merging.rounding import BF16, F16, F32, F64
from weightsmith.models.safetensors import BITS, TensorInfo
from weightsmith.models.tensors import array_type

T = TypeVar("T")
ARRAY_TYPES = {"BF16": BF16, "F16": F16, "F32": F32, "F64": F64}
_MODE = 0o644
_PIECE = 1 << 18
_KEPT = 4
"""Sliced factors to cache: those of a layer's experts, for both projections."""
_MADE = 2
"""Dequantized tensors to cache."""


class Reader:
    """An open file for positioned reads by several threads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)

    def read_into(self, data: np.ndarray, start: int) -> np.ndarray:
        """Fill `data` from offset `start` and return it; raise InputRefused at the file's end."""
        view, done = as_bytes(data), 0
        while done < len(view):
            count = os.preadv(self._fd, [view[done:]], start + done)
            if not count:
                raise InputRefused(
                    f"{self.path} was truncated while it was read",
                    hint="another process writes to it; run again when that is done",
                )
            done += count
        return data

    def rows(self, info: TensorInfo, first: int, count: int, columns: int) -> np.ndarray:
        """Return rows of a tensor viewed as a matrix, in its own dtype."""
        row = columns * BITS[info.dtype] // 8
        data = self.read_into(np.empty(count * row, np.uint8), info.start + first * row)
        return data.view(ARRAY_TYPES[info.dtype]).reshape(count, columns)


class OpenFiles:
    """The input files of a merge, each opened once; thread-safe."""

    def __init__(self) -> None:
        self._readers: dict[Path, Reader] = {}
        self._kept: OrderedDict[tuple[Path, str, int, int], np.ndarray] = OrderedDict()
        self._made: OrderedDict[object, np.ndarray] = OrderedDict()
        self._for_all: dict[Hashable, Any] = {}
        self._lock, self._making, self._sharing = (threading.Lock() for _ in range(3))

    def reader(self, path: Path) -> Reader:
        """Return the file, opened if needed."""
        with self._lock:
            if path not in self._readers:
                self._readers[path] = Reader(path)
            return self._readers[path]

    def close(self) -> None:
        """Close all files."""
        for reader in self._readers.values():
            reader.close()
        self._readers.clear()
        self._kept.clear()
        self._made.clear()
        self._for_all.clear()

    def rows(self, stored: StoredTensor, first: int, count: int, columns: int) -> np.ndarray:
        """Return rows of a stored tensor, see `Reader.rows`."""
        return self.reader(stored.path).rows(stored.info, first, count, columns)

    def array(self, stored: StoredTensor) -> np.ndarray:
        """Return a whole tensor of any type, in its own shape."""
        info, reader = stored.info, self.reader(stored.path)
        data = reader.read_into(np.empty(info.size, np.uint8), info.start)
        array: np.ndarray = data.view(array_type(info.dtype)).reshape(info.shape)
        return array

    def once(self, key: object, make: Callable[[], np.ndarray]) -> np.ndarray:
        """Return the cached result of `make` for the key; only the last two are kept.

        Blocks of at most two consecutive tensors are in flight at a time.
        """
        with self._making:
            if key not in self._made:
                self._made[key] = make()
                while len(self._made) > _MADE:
                    self._made.popitem(last=False)
            return self._made[key]

    def for_all(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return the result of `make` for the key, kept for all tensors until the files close."""
        with self._sharing:
            if key not in self._for_all:
                self._for_all[key] = make()
            found: T = self._for_all[key]
            return found

    def matrix(self, part: MatrixView | None) -> np.ndarray:
        """Return a factor as float32, which represents every supported dtype exactly.

        None is a single 1. Raises InputRefused if a factor is not finite.
        """
        if part is None:
            return np.ones((1, 1), F32)
        path, info = part.stored.path, part.stored.info
        # Sliced tensors are kept for the next part.
        key = (path, info.name, part.height, part.blocks)
        with self._lock:
            tensor = self._kept.get(key)
            if tensor is not None:
                self._kept.move_to_end(key)
        if tensor is None:
            tensor = as_float(part.stored.rows(self, 0, part.height, part.width), F32)
            if not np.isfinite(tensor).all():
                raise InputRefused(
                    f"{path}: {info.name} has NaN or infinite values",
                    hint="the training diverged or the file is damaged; use an earlier checkpoint",
                )
            if part.blocks > 1:
                blocks = tensor.reshape(part.blocks, -1, tensor.shape[1])
                count, rows, columns = blocks.shape
                wide = np.zeros((count, rows, count, columns), F32)
                wide[range(count), :, range(count)] = blocks
                tensor = wide.reshape(count * rows, count * columns)
            if not part.whole:
                with self._lock:
                    self._kept[key] = tensor
                    while len(self._kept) > _KEPT:
                        self._kept.popitem(last=False)
        whole = tensor[part.rows, part.columns]
        return whole.T if part.transposed else whole


@dataclass(frozen=True, slots=True)
class Checksum:
    """A byte range of a file, and its projection onto random odd numbers modulo 2**64.

    An odd factor never maps a difference to zero, so a single wrong word is always detected;
    several wrong words are missed with a probability of 2**-63.
    """

    start: int
    size: int
    value: int


_ODD = np.random.default_rng().integers(0, 1 << 63, _PIECE // 8, np.uint64) * 2 + 1


def continued(value: int, data: memoryview, before: int = 0) -> int:
    """Return a checksum's value after more bytes, which follow `before` bytes, a multiple of 8."""
    at = 0
    while at < len(data):
        place = (before + at) % _PIECE
        part = data[at : at + _PIECE - place]
        count = len(part) // 8
        words = np.frombuffer(part, np.uint64, count)
        tail = int.from_bytes(part[8 * count :], "little")
        odd = sum_words(words, _ODD[place // 8 :][:count]) + tail * 0x9E3779B97F4A7C15
        value = (value * (1 if place else 0x2545F4914F6CDD1D) + odd) % (1 << 64)
        at += len(part)
    return value


class Writer:
    """Writes a file that gets its name only when complete, and computes its sha256."""

    def __init__(self, path: Path, size: int = 0) -> None:
        """Start a file of `size` bytes (0: unknown)."""
        self.path, self.size = path, 0
        self.checksums: list[Checksum] = []
        self._temporary = path.with_name(f".{path.name}.partial")
        self._hash = hashlib.sha256()
        try:
            self._file = self._temporary.open("wb", buffering=0)
        except OSError as error:
            raise _disk(path, error) from error
        try:
            reserve(self._file.fileno(), size)
        except OSError as error:
            self.abandon()
            raise _disk(path, error) from error

    def write(self, data: bytes | memoryview) -> None:
        """Append data, and hash it piece by piece while it is in the CPU cache."""
        view, value = memoryview(data), 0
        try:
            for start in range(0, len(view), _PIECE):
                part = view[start : start + _PIECE]
                self._hash.update(part)
                value = continued(value, part)
                while part:
                    part = part[self._file.write(part) or 0 :]
        except OSError as error:
            raise _disk(self.path, error) from error
        self.checksums.append(Checksum(self.size, len(view), value))
        self.size += len(data)

    def finish(self) -> dict[str, JsonValue]:
        """Flush to disk, rename into place, and return path, size and sha256."""
        try:
            self._file.flush()
            os.fchmod(self._file.fileno(), _MODE)
            os.fsync(self._file.fileno())
            self._file.close()
            self._temporary.rename(self.path)
            sync_folder(self.path.parent)
        except OSError as error:
            raise _disk(self.path, error) from error
        return {"file": self.path.name, "size": self.size, "sha256": self._hash.hexdigest()}

    def abandon(self) -> None:
        """Close and delete the unfinished file."""
        self._file.close()
        self._temporary.unlink(missing_ok=True)


def sha256_file(path: Path) -> str:
    """Return a file's sha256 in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def as_bytes(array: np.ndarray) -> memoryview:
    """Return a contiguous array's memory without copying."""
    data: Any = array.reshape(-1).view(np.uint8)
    return memoryview(data)


def _disk(path: Path, error: OSError) -> EnvironmentFailure:
    return EnvironmentFailure(
        f"{path} cannot be written: {error.strerror}",
        hint="check free space and permissions; finished shards are kept",
    )
