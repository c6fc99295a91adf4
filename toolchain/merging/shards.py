"""One shard at a time: blocks are computed by several workers and written in their order."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from toolchain.checkpoints.safetensors import BITS, Header, TensorInfo, build_header
from toolchain.errors import InputRefused
from toolchain.merging.families.family import Term
from toolchain.merging.kernel import PIECE, Prepared, Space, merge_rows, merge_rows_fast, prepare
from toolchain.merging.plan import MergePlan
from toolchain.merging.repair import Factors, Repairs
from toolchain.merging.rounding import round_once
from toolchain.merging.stream import TORCH_TYPES, Buffers, Reader, Writer, as_bytes

BLOCK = 1 << 20
"""Elements per block on the CPU: repairs and hand-overs cost the less, the larger it is."""
_COPY_BYTES = 1 << 20
_AHEAD = 2
"""Blocks in flight per worker: enough that nobody waits, few enough to keep memory small."""


@dataclass(slots=True)
class Tally:
    """What happened to the tensors, counted while they stream by."""

    merged: int = 0
    copied: int = 0
    cast: int = 0
    repairs: Repairs = field(default_factory=Repairs)
    silent: dict[int, list[str]] = field(default_factory=dict)
    """Adapter -> its modules whose B is all zero."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How blocks are computed; none of it changes the bytes of an exact merge."""

    exact: bool
    device: str
    workers: int
    block: int = BLOCK
    piece: int = PIECE


Filled = tuple[torch.Tensor, int]
"""A buffer and how many of its bytes are to be written."""

Block = Callable[[], Filled]


class ShardMaker:
    """Writes the shards of one plan."""

    def __init__(self, plan: MergePlan, settings: Settings, tally: Tally) -> None:
        self._plan, self._settings, self._tally = plan, settings, tally
        self._adapters = [Reader(adapter.header.path) for adapter in plan.adapters]
        self._pool = ThreadPoolExecutor(
            settings.workers, "merge", initializer=torch.set_num_threads, initargs=(1,)
        )
        self._buffers = Buffers()
        self._local, self._lock = threading.local(), threading.Lock()

    def close(self) -> None:
        """Stop the workers and give the files back."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        for reader in self._adapters:
            reader.close()

    def write(self, shard: Header, path: Path, progress: Callable[[int], None]) -> dict[str, Any]:
        """Write a shard's merged form: same tensors, same order; return file, size and sha256.

        `progress` is told the bytes of each block once they are written.
        """
        reader, writer = Reader(shard.path), Writer(path)
        tensors = [(i.name, self._plan.out_dtype(i), i.shape) for i in shard.tensors]
        waiting: deque[Future[Filled]] = deque()
        try:
            writer.write(build_header(tensors, {"format": "pt"}))
            blocks = (block for info in shard.tensors for block in self._blocks(reader, info))
            for block in blocks:
                waiting.append(self._pool.submit(block))
                if len(waiting) >= _AHEAD * self._settings.workers:
                    progress(self._append(writer, waiting))
            while waiting:
                progress(self._append(writer, waiting))
            return writer.finish()
        except BaseException:
            for future in waiting:
                future.cancel()
            writer.abandon()
            raise
        finally:
            # Workers may still read; the file must stay open until the last of them is done.
            for future in waiting:
                if not future.cancelled():
                    future.exception()
            reader.close()

    def _blocks(self, reader: Reader, info: TensorInfo) -> Iterator[Block]:
        """Yield the work of one tensor, in the order of its bytes."""
        terms = self._plan.terms.get(info.name, ())
        prepared = self._prepare(info, terms) if terms and info.size else None
        if prepared is not None:
            self._tally.merged += 1
            yield from self._merged(reader, info, prepared)
        elif self._plan.out_dtype(info) != info.dtype:
            self._tally.cast += 1
            yield from self._casts(reader, info)
        else:
            self._tally.copied += 1
            for start in range(info.start, info.end, _COPY_BYTES):
                size = min(_COPY_BYTES, info.end - start)
                yield partial(self._copy, reader, start, size)

    def _prepare(self, info: TensorInfo, terms: tuple[Term, ...]) -> Prepared | None:
        """Read the factors of one tensor; None where they add nothing at all."""
        lefts, rights, gains = [], [], []
        for term in terms:
            a, b = (self._factor(term, side) for side in (term.a, term.b))
            if not b.any():
                self._tally.silent.setdefault(term.adapter, []).append(info.name)
                continue
            lefts.append(a.T if term.transposed else b)
            rights.append(b.T if term.transposed else a)
            gains += [term.factor] * term.rank
        if not lefts:
            return None
        one = len(lefts) == 1
        factors = Factors(
            left=lefts[0].contiguous() if one else torch.cat(lefts, 1),
            right=rights[0].contiguous() if one else torch.cat(rights, 0),
            gains=torch.tensor(gains, dtype=torch.float64),
        )
        dtype = TORCH_TYPES[self._plan.out_dtype(info)]
        return prepare(info.name, factors, dtype, self._settings.device)

    def _factor(self, term: Term, info: TensorInfo) -> torch.Tensor:
        matrix = self._adapters[term.adapter].matrix(info)
        if not torch.isfinite(matrix).all():
            raise InputRefused(
                f"{self._adapters[term.adapter].path}: {info.name} holds NaN or infinite values",
                hint="the training diverged or the file is damaged; use an earlier checkpoint",
            )
        return matrix

    def _merged(self, reader: Reader, info: TensorInfo, prepared: Prepared) -> Iterator[Block]:
        rows, columns = info.shape
        step = max(1, self._settings.block // columns)
        for first in range(0, rows, step):
            count = min(step, rows - first)
            yield partial(self._merge, prepared, reader, info, first, count)

    def _append(self, writer: Writer, waiting: deque[Future[Filled]]) -> int:
        """Write the oldest block; return its bytes."""
        buffer, size = waiting.popleft().result()
        writer.write(as_bytes(buffer[:size]))
        self._buffers.give(buffer)
        return size

    def _copy(self, reader: Reader, start: int, size: int) -> Filled:
        buffer = self._buffers.take(size)
        reader.read_into(buffer[:size], start)
        return buffer, size

    def _merge(
        self, prepared: Prepared, reader: Reader, info: TensorInfo, first: int, count: int
    ) -> Filled:
        elements = count * info.shape[1]
        size = elements * prepared.dtype.itemsize
        held, buffer = (
            self._buffers.take(elements * BITS[info.dtype] // 8),
            self._buffers.take(size),
        )
        weight = reader.rows(info, first, count, held)
        out, space = buffer[:size].view(prepared.dtype).view(count, -1), self._space(prepared, info)
        if self._settings.exact:
            done = merge_rows(prepared, weight, first, space, out)
            with self._lock:
                self._tally.repairs.float64 += done.float64
                self._tally.repairs.exact += done.exact
        else:
            merge_rows_fast(prepared, weight, first, space, out)
        self._buffers.give(held)
        return buffer, size

    def _space(self, prepared: Prepared, info: TensorInfo) -> Space:
        """Return this worker's buffers, larger or of another type only when they must be."""
        key, columns = (prepared.dtype, prepared.work), info.shape[1]
        held: tuple[Any, int, Space] | None = getattr(self._local, "space", None)
        if held is None or held[0] != key or held[1] < columns:
            size = max(columns, self._settings.piece)
            held = (key, size, Space(size, *key, self._settings.device))
            self._local.space = held
        return held[2]

    def _casts(self, reader: Reader, info: TensorInfo) -> Iterator[Block]:
        width = BITS[info.dtype] // 8
        for start in range(info.start, info.end, BLOCK * width):
            size = min(BLOCK * width, info.end - start)
            yield partial(self._cast, reader, info, start, size)

    def _cast(self, reader: Reader, info: TensorInfo, start: int, size: int) -> Filled:
        held = torch.empty(size, dtype=torch.uint8)
        values = reader.read_into(held, start).view(TORCH_TYPES[info.dtype])
        out = round_once(values, TORCH_TYPES[self._plan.out_dtype(info)])
        if not torch.equal(torch.isfinite(out), torch.isfinite(values)):
            raise InputRefused(
                f"the base's {info.name} reaches {float(values.abs().max()):g}, which "
                f"{str(out.dtype).removeprefix('torch.')} cannot hold",
                hint="merge with dtype bfloat16 or float32",
            )
        return out.view(torch.uint8), out.nbytes
