"""Write a checkpoint tensor by tensor."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightsmith.checkpoints.safetensors import BITS, build_header
from weightsmith.checkpoints.tensors import array_type

if TYPE_CHECKING:
    import numpy.typing as npt

SHARD_BYTES = 4 << 30
"""Maximum shard size, suitable for registries and engines."""


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
