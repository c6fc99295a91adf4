"""Read a checkpoint's tensors as numpy arrays, one at a time, without torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from weightsmith.checkpoints.safetensors import TensorInfo, open_checkpoint
from weightsmith.errors import InputRefused

_NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I8": "i1", "U8": "u1", "I32": "<i4"}


class CheckpointTensors:
    """The tensors of a folder's safetensors files; only requested ones are read."""

    def __init__(self, root: Path) -> None:
        """Read the headers; raise InputRefused for damaged or incomplete files."""
        self._where: dict[str, tuple[Path, TensorInfo]] = {
            info.name: (shard.path, info)
            for shard in open_checkpoint(root).shards
            for info in shard.tensors
        }

    @property
    def names(self) -> frozenset[str]:
        """Every tensor's name."""
        return frozenset(self._where)

    def dtype(self, name: str) -> str:
        """Return a tensor's safetensors dtype, such as `BF16`."""
        return self._where[name][1].dtype

    def raw(self, name: str) -> npt.NDArray[np.generic]:
        """Return a tensor in its own dtype; BF16 and 8-bit floats as unsigned integers."""
        path, info = self._where[name]
        kind = _NUMPY.get(info.dtype, {2: "<u2", 1: "u1"}.get(info.size // max(1, _count(info))))
        if kind is None:
            raise InputRefused(
                f"{name} has the unsupported dtype {info.dtype}",
                hint="start from a checkpoint in float32, float16 or bfloat16",
            )
        data = np.memmap(path, mode="r", offset=info.start, shape=(info.size,), dtype=np.uint8)
        return data.view(kind).reshape(info.shape)

    def tensor(self, name: str) -> npt.NDArray[np.float32]:
        """Return a floating-point tensor of 64, 32 or 16 bits as float32."""
        data, dtype = self.raw(name), self.dtype(name)
        if dtype == "BF16":
            return (data.astype(np.uint32) << 16).view(np.float32)
        if dtype not in {"F64", "F32", "F16"}:
            raise InputRefused(
                f"{name} has dtype {dtype}, not a floating-point dtype",
                hint="start from a checkpoint in float32, float16 or bfloat16",
            )
        return data.astype(np.float32)


def _count(info: TensorInfo) -> int:
    return int(np.prod(info.shape, dtype=np.int64))
