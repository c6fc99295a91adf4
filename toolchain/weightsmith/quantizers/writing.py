"""Write a checkpoint a few rows at a time; after an interrupt, finished shards are kept."""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import numpy.typing as npt

from weightsmith.models.safetensors import BITS, build_header
from weightsmith.models.tensors import CheckpointTensors, array_type

SHARD_BYTES = 4 << 30
"""Maximum shard size, suitable for registries and engines."""
_COPIED = 1 << 22
"""Bytes of an unchanged tensor that are copied at a time."""
_JOURNAL = ".shards"
"""Names the finished shards while a checkpoint is being written."""


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """A tensor to write."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * BITS[self.dtype] // 8


@dataclass(frozen=True, slots=True)
class TensorGroup:
    """Tensors that are computed together, such as a matrix's codes and scales."""

    outputs: tuple[OutputTensor, ...]
    blocks: Callable[[], Iterator[tuple[str, npt.NDArray[np.generic]]]]
    """() -> tensor names and their next rows, in the tensor's dtype."""
    chain: str = ""
    """Groups with the same one are computed one after the other; "" with any others."""


def whole(
    name: str, dtype: str, shape: tuple[int, ...], make: Callable[[], np.ndarray]
) -> TensorGroup:
    """Return the work for one tensor that is computed as a whole."""

    def blocks() -> Iterator[tuple[str, npt.NDArray[np.generic]]]:
        data = make()
        if data.shape != shape or data.dtype != array_type(dtype):
            raise ValueError(f"{name} is {data.dtype} {data.shape}")
        yield name, data

    return TensorGroup((OutputTensor(name, dtype, shape),), blocks)


def copied(source: CheckpointTensors, name: str) -> TensorGroup:
    """Return the work for a tensor of the source that does not change."""

    def blocks() -> Iterator[tuple[str, npt.NDArray[np.generic]]]:
        for start in range(0, info.size, _COPIED):
            yield name, source.raw(name, start, start + _COPIED)

    info = source.info(name)
    return TensorGroup((OutputTensor(name, info.dtype, info.shape),), blocks)


def write_checkpoint(folder: Path, works: Iterable[TensorGroup], threads: int = 1) -> None:
    """Write the tensors sorted by name, as one file or as shards with an index.

    Each thread computes groups of its own. Each shard gets its name when it is complete and on the
    disk. A second call with the same works after an interrupt keeps the shards that are finished.
    """
    made = {output.name: (output, work) for work in works for output in work.outputs}
    shards: list[list[OutputTensor]] = [[]]
    room = SHARD_BYTES
    for name in sorted(made):
        output = made[name][0]
        if shards[-1] and output.size > room:
            shards.append([])
            room = SHARD_BYTES
        room -= output.size
        shards[-1].append(output)
    names, count = ["model.safetensors"], len(shards)
    if count > 1:
        names = [f"model-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)]
    journal = folder / _JOURNAL
    finished = journal.read_text("utf-8").split("\n")[:-1] if journal.is_file() else []
    with journal.open("a", encoding="utf-8") as log:
        for name, shard in zip(names, shards, strict=True):
            if name not in finished:
                needed = {id(made[o.name][1]): made[o.name][1] for o in shard}
                _write_shard(folder / name, shard, list(needed.values()), threads)
                log.write(name + "\n")
                log.flush()
                os.fsync(log.fileno())
    if count > 1:
        total = sum(output.size for shard in shards for output in shard)
        places = {o.name: name for name, shard in zip(names, shards, strict=True) for o in shard}
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(
            json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8"
        )
    journal.unlink()


def _write_shard(
    path: Path, outputs: Sequence[OutputTensor], works: Sequence[TensorGroup], threads: int
) -> None:
    """Write one shard beside its name, and rename it."""
    header = build_header(((o.name, o.dtype, o.shape) for o in outputs), {"format": "pt"})
    places, place = {}, len(header)
    for output in outputs:
        places[output.name] = place
        place += output.size
    ends = {output.name: places[output.name] + output.size for output in outputs}
    partial = path.with_name(f".{path.name}.partial")
    ended = threading.Event()
    with partial.open("wb", buffering=0) as file:
        file.write(header)
        file.truncate(place)

        def write(some: Iterable[TensorGroup]) -> None:
            for name, data in chain.from_iterable(work.blocks() for work in some):
                if ended.is_set():
                    return
                # A matrix's codes and scales may be in two shards.
                if name in places:
                    rest = data.reshape(-1).view("u1").data
                    while rest:
                        count = os.pwrite(file.fileno(), rest, places[name])
                        places[name] += count
                        rest = rest[count:]

        if threads == 1:  # in the caller's own, which may have torch's settings
            write(works)
        else:
            chains: dict[object, list[TensorGroup]] = {}
            for work in works:
                chains.setdefault(work.chain or id(work), []).append(work)
            pool = ThreadPoolExecutor(threads, "write")
            try:
                for done in [pool.submit(write, some) for some in chains.values()]:
                    done.result()
            finally:  # of an error or a signal, too
                ended.set()
                pool.shutdown(cancel_futures=True)
        os.fsync(file.fileno())
    if places != ends:
        raise ValueError(f"{min(n for n in ends if places[n] != ends[n])} has the wrong size")
    partial.rename(path)
