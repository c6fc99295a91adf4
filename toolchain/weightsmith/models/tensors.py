"""Read a checkpoint's tensors as numpy arrays, one at a time, without torch.

Some files have no data, which is computed when it is read: such a file is the header of the file
that it stands for, with its names, types, shapes and offsets. A job says what computes the data
(`filled`) before anything reads them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from weightsmith.core.errors import InputRefused
from weightsmith.core.small_floats import BFLOAT16, as_float, name_of, small_float
from weightsmith.core.values import FileEntry, Tree
from weightsmith.models.safetensors import NO_DATA, SafetensorsHeader, TensorInfo, open_checkpoint

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_NUMPY = {
    "F64": "f8", "F32": "f4", "F16": "f2", "I64": "i8", "I32": "i4", "I16": "i2", "I8": "i1",
    "U8": "u1", "BOOL": "?", "F8_E8M0": "u1",
}  # fmt: skip
_SMALL = {"BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}


def array_type(dtype: str) -> np.dtype[np.generic]:
    """Return numpy's dtype for a safetensors dtype; raise KeyError if there is none.

    Floats that are only an exponent are read as bytes.
    """
    import numpy as np

    if dtype in _SMALL:
        return small_float(_SMALL[dtype])
    return np.dtype("<" + _NUMPY[dtype])


def unsupported(name: str, dtype: str) -> InputRefused:
    """Return the refusal of a model's weight, because of its safetensors dtype."""
    return InputRefused(
        f"{name} has the unsupported dtype {dtype}",
        hint="models in bfloat16, float16 and float32 can be merged and quantized: load it with "
        "from_pretrained(…, dtype=torch.float32) and write it with save_pretrained",
    )


def widened(values: npt.NDArray[np.generic]) -> npt.NDArray[np.float32]:
    """Return floats as float32; bfloat16 by its bits, faster than ml_dtypes does it."""
    return as_float(values).view("f4")


def largest(values: npt.NDArray[np.generic]) -> float:
    """Return the largest magnitude of floats, which is not below zero; NaN counts as more than all.

    `values` is not empty. Without their sign, the bits of floats have the order of magnitudes.
    """
    import numpy as np

    signed, bits = (values.view(f"{kind}{values.itemsize}") for kind in "iu")
    # As signed integers, floats below zero are below all others; as unsigned ones, above them. So
    # two maxima find the largest of both kinds, three times as fast as removing signs first.
    most = max(int(signed.max()), int(bits.max()) & np.iinfo(signed.dtype).max)
    found = np.array([most], bits.dtype).view(values.dtype)
    return float((as_float(found) if name_of(found.dtype) == BFLOAT16 else found).item())


class View(Protocol):
    """A model's tensors by the checkpoint's names, dequantized if it is quantized."""

    @property
    def names(self) -> frozenset[str]:
        """Names of the tensors."""

    def tensor(self, name: str) -> npt.NDArray[np.float32]:
        """Return one tensor as float32 in the checkpoint's shape and order."""

    def rows(self, name: str, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Return some rows of such a tensor; only they are dequantized."""

    def kind(self, name: str) -> str:
        """Return how the tensor is stored, as in quality/runs.py; "" if unknown."""


class CheckpointTensors:
    """The tensors of a folder's safetensors files, memory-mapped unless they are computed."""

    def __init__(self, folder: Path) -> None:
        """Read the headers; raise InputRefused for damaged or incomplete files."""
        shards = open_checkpoint(folder).shards
        self._where = {info.name: (shard, info) for shard in shards for info in shard.tensors}
        self.names = frozenset(self._where)
        """Every tensor's name; made once, since checks of 90,000 tensors ask for each."""
        self._last: tuple[tuple[str, int, int], npt.NDArray[np.uint8]] | None = None

    @property
    def size(self) -> int:
        """Total size of the tensors in bytes."""
        return sum(info.size for _, info in self._where.values())

    def info(self, name: str) -> TensorInfo:
        """Return dtype, shape and offsets; raise KeyError for an unknown name."""
        return self._where[name][1]

    def array(self, name: str, where: tuple[int | slice, ...] = ()) -> npt.NDArray[np.generic]:
        """Return a tensor, or a part of it, in its own dtype; only that is read or computed."""
        return self._part(name, array_type(self.info(name).dtype), where)

    def f32(self, name: str) -> npt.NDArray[np.float32]:
        """Return a tensor of any dtype as float32."""
        return self.part(name, ())

    def part(self, name: str, where: tuple[int | slice, ...]) -> npt.NDArray[np.float32]:
        """Return a part of a tensor of any dtype as float32; only its rows are read or computed."""
        import numpy as np

        if self.info(name).dtype == "BF16":  # GGUF's builder has no ml_dtypes
            # A scalar's array has no dimension, and numpy converts it to a number.
            bits = np.asarray(self._part(name, np.dtype("<u2"), where).astype(np.uint32))
            return np.left_shift(bits, 16, out=bits).view(np.float32)
        return np.asarray(self.array(name, where).astype(np.float32))

    def raw(self, name: str, start: int = 0, stop: int | None = None) -> npt.NDArray[np.uint8]:
        """Return a tensor's bytes from `start` to `stop`, read from the disk as they are used."""
        import numpy as np

        shard, info = self._where[name]
        start, stop, _ = slice(start, stop).indices(info.size)
        if start >= stop:
            return np.zeros(0, np.uint8)
        if data := data_of(shard):
            return data.read(info.start + start, stop - start)
        size = (stop - start,)
        return np.asarray(np.memmap(shard.path, np.uint8, "r", info.start + start, size))

    def tensor(self, name: str) -> npt.NDArray[np.float32]:
        """Return a tensor as float32; raise InputRefused unless it is a float of 16 to 64 bits."""
        dtype = self.info(name).dtype
        if dtype not in {"F64", "F32", "F16", "BF16"}:
            raise InputRefused(
                f"{name} has dtype {dtype}, not a floating-point dtype",
                hint="start from a checkpoint in float32, float16 or bfloat16",
            )
        return self.f32(name)

    def _part(
        self, name: str, kind: np.dtype[np.generic], where: tuple[int | slice, ...]
    ) -> npt.NDArray[np.generic]:
        shape, start, size = self.info(name).shape, 0, self.info(name).size
        while where and shape and size:
            step = size // shape[0]
            if isinstance(where[0], slice):
                first, last, _ = where[0].indices(shape[0])
                start, size = start + first * step, (last - first) * step
                shape, where = (last - first, *shape[1:]), (slice(None), *where[1:])
                break
            start, size, shape, where = start + where[0] * step, step, shape[1:], where[1:]
        read = self._remembered_bytes if len(where) > 1 else self.raw
        return read(name, start, start + size).view(kind).reshape(shape)[where]

    def _remembered_bytes(self, name: str, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """Return a tensor's bytes, and keep them: other columns of the same rows come next."""
        key, last = (name, start, stop), self._last
        if last is None or last[0] != key:
            self._last = last = (key, self.raw(name, start, stop))
        return last[1]


class Data(Protocol):
    """Computes what a file would hold."""

    def read(self, start: int, size: int) -> np.ndarray:
        """Return bytes of tensors by their offset in the file: uint8 [size]; thread-safe."""


_FILLED: dict[Path, Data] = {}
"""By the file's real path. A job has one such checkpoint, and many places read it."""


@contextmanager
def filled(files: Mapping[Path, Data]) -> Iterator[None]:
    """Let readers compute the data of these files while the block runs."""
    known = {path.resolve(): data for path, data in files.items()}
    _FILLED.update(known)
    try:
        yield
    finally:
        for path in known:
            _FILLED.pop(path)


def has_no_data(header: SafetensorsHeader) -> bool:
    """Return whether a file has no data of its own."""
    return header.metadata == NO_DATA


def data_of(header: SafetensorsHeader) -> Data | None:
    """Return what computes a file's data; None for a file that has it.

    Raises InputRefused if nothing does.
    """
    if not has_no_data(header):
        return None
    if (found := _FILLED.get(header.path.resolve())) is None:
        raise InputRefused(
            f"{header.path} has no data: its weights are computed from base and adapters",
            hint="merge again to write them (`weightsmith merge`)",
        )
    return found


def computed(path: Path) -> Data | None:
    """Return what computes the data of a file whose header was read before, or None."""
    return _FILLED.get(path.resolve()) if _FILLED else None


class HeaderOnlyTree(Tree):
    """A tree of files that were not written; headers and small files are those of another tree."""

    __slots__ = ("_there",)
    _there: Tree

    def __init__(self, files: tuple[FileEntry, ...], there: Tree) -> None:
        object.__setattr__(self, "_there", there)
        object.__setattr__(self, "files", files)
        object.__setattr__(self, "places", {})

    def __repr__(self) -> str:
        """Return a text without the other tree, which may be fetched where it is used."""
        return f"HeaderOnlyTree({len(self.files)} files)"

    @property
    def root(self) -> Path:
        """The folder of the other tree."""
        return self._there.root

    @property
    def texts(self) -> Path:
        """A folder with all files but the weights."""
        return self._there.texts

    def path(self, name: str) -> Path:
        """Return the location of a file; of weights, that of their header."""
        return self._there.path(name)
