"""Checkpoint tensors as arrays: memory-mapped for reading, written one at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightsmith.checkpoints.safetensors import BITS, TensorInfo, build_header, open_checkpoint

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

SHARD_BYTES = 4 << 30
"""Maximum shard size, suitable for registries and engines."""
_PLAIN = {
    "F64": "f8", "F32": "f4", "F16": "f2", "I64": "i8", "I32": "i4", "I16": "i2", "I8": "i1",
    "U8": "u1", "BOOL": "?",
}  # fmt: skip
_SMALL = {"BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn"}


def array_type(dtype: str) -> np.dtype[Any]:
    """Return numpy's dtype for a safetensors dtype; raise KeyError if there is none."""
    import numpy as np

    if dtype in _SMALL:
        import ml_dtypes

        small: np.dtype[Any] = np.dtype(getattr(ml_dtypes, _SMALL[dtype]))
        return small
    return np.dtype("<" + _PLAIN[dtype])


class Tensors:
    """The memory-mapped tensors of a checkpoint folder."""

    def __init__(self, folder: Path) -> None:
        """Read the headers; raise InputRefused if they are invalid."""
        index = open_checkpoint(folder)
        self.folder = folder
        self._shards = {info.name: shard.path for shard in index.shards for info in shard.tensors}
        self._infos: Mapping[str, TensorInfo] = index.tensors

    @property
    def names(self) -> frozenset[str]:
        """Every tensor's name."""
        return frozenset(self._infos)

    def info(self, name: str) -> TensorInfo:
        """Return dtype, shape and offsets; raise KeyError for an unknown name."""
        return self._infos[name]

    def array(self, name: str) -> npt.NDArray[Any]:
        """Return a memory-mapped tensor in its own dtype."""
        import numpy as np

        info = self._infos[name]
        kind = array_type(info.dtype)
        if info.size == 0:
            return np.zeros(info.shape, kind)
        raw = np.memmap(self._shards[name], np.uint8, "r", offset=info.start, shape=(info.size,))
        return np.asarray(raw).view(kind).reshape(info.shape)

    def f32(self, name: str) -> npt.NDArray[np.float32]:
        """Return a tensor as float32."""
        import numpy as np

        return np.asarray(self.array(name).astype(np.float32))

    @property
    def size(self) -> int:
        """Total size of the tensors in bytes."""
        return sum(info.size for info in self._infos.values())


@dataclass(frozen=True, slots=True)
class Output:
    """A tensor to write, computed when it is written."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    make: Callable[[], npt.NDArray[Any]]

    @property
    def size(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * BITS[self.dtype] // 8


def write_checkpoint(folder: Path, outputs: Iterable[Output]) -> None:
    """Write the tensors sorted by name, as one file or as shards with an index."""
    ordered = sorted(outputs, key=lambda output: output.name)
    shards: list[list[Output]] = [[]]
    for output in ordered:
        if shards[-1] and sum(o.size for o in shards[-1]) + output.size > SHARD_BYTES:
            shards.append([])
        shards[-1].append(output)
    total = sum(output.size for output in ordered)
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = "model.safetensors"
        if len(shards) > 1:
            name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        places |= {output.name: name for output in shard}
        with (folder / name).open("wb") as file:
            file.write(build_header(((o.name, o.dtype, o.shape) for o in shard), {"format": "pt"}))
            for output in shard:
                data = output.make()
                if data.shape != output.shape or data.dtype != array_type(output.dtype):
                    raise ValueError(f"{output.name} is {data.dtype} {data.shape}")
                file.write(memoryview(data.tobytes()))
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(
            json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8"
        )
