"""Base and adapters seen as the merged checkpoint, whose rows are computed when they are read."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from weightsmith.checkpoints.safetensors import BITS, TensorInfo, read_header
from weightsmith.checkpoints.without_data import filled
from weightsmith.merge_options import Merge
from weightsmith.merging.blocks import RowMaker, Settings, Span, stored_copy
from weightsmith.merging.combining.combination import Combination
from weightsmith.merging.kernel import check_arithmetic
from weightsmith.merging.outputs import Output
from weightsmith.merging.plan import MergePlan, make_plan
from weightsmith.merging.stream import as_bytes
from weightsmith.merging.tally import Tally

_KEPT = 8
"""Tensors of a file whose factors stay in memory: those that are read at the same time."""


@contextmanager
def opened(
    folder: Path, base: Path, adapters: tuple[tuple[Path, float], ...], options: Merge
) -> Iterator[None]:
    """Compute the data of the folder's files, which have none, while the block runs.

    Raises InputRefused as the merge does, and EnvironmentFailure as it does.
    """
    check_arithmetic()
    plan = make_plan(
        base,
        adapters,
        dtype=options.dtype,
        combination=Combination.of(options),
        quantized_base=options.quantized_base,
    )
    checkpoint = VirtualCheckpoint(plan, Settings(device="cpu", workers=1))
    files = {
        path: VirtualFile(read_header(path).tensors, checkpoint)
        for path in (folder / shard.name for shard in plan.shards)
    }
    try:
        with filled(files):
            yield
    finally:
        checkpoint.close()


class VirtualCheckpoint:
    """The tensors that a merge would write, with the same bits.

    Rows may be read in any order and by several threads. `close` closes the input files.
    """

    def __init__(self, plan: MergePlan, settings: Settings) -> None:
        self._maker = RowMaker(settings, Tally())
        self.outputs = plan.outputs

    def tensor(self, name: str) -> VirtualTensor:
        """Return a tensor; it holds its factors while it is in use. Raises KeyError."""
        return VirtualTensor(self.outputs[name], self._maker)

    def close(self) -> None:
        """Close the input files."""
        self._maker.files.close()


class VirtualFile:
    """A shard's data, by offset in the file that a merge would write."""

    def __init__(self, infos: tuple[TensorInfo, ...], checkpoint: VirtualCheckpoint) -> None:
        self._infos = [info for info in infos if info.size]
        self._checkpoint = checkpoint
        self._kept: OrderedDict[str, VirtualTensor] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, start: int, size: int) -> np.ndarray:
        """Return bytes of tensors: uint8 [size]. Raises InputRefused as the merge does."""
        end = start + size
        parts = []
        for info in self._infos[bisect_right(self._infos, start, key=_end) :]:
            if info.start >= end:
                break
            parts.append(self._part(info, max(start, info.start), min(end, info.end)))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _part(self, info: TensorInfo, start: int, end: int) -> np.ndarray:
        tensor = self._tensor(info.name)
        row, before = tensor.row_bytes, (start - info.start) // tensor.row_bytes
        after = -(-(end - info.start) // row)
        found = tensor.read(before, after - before).reshape(-1)
        skipped = start - info.start - before * row
        return found[skipped : skipped + end - start]

    def _tensor(self, name: str) -> VirtualTensor:
        with self._lock:
            tensor = self._kept.pop(name, None) or self._checkpoint.tensor(name)
            self._kept[name] = tensor
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
            return tensor


def _end(info: TensorInfo) -> int:
    return info.end


class VirtualTensor:
    """One tensor, viewed as a matrix."""

    def __init__(self, output: Output, maker: RowMaker) -> None:
        self.output, self._maker, self._lock = output, maker, threading.Lock()
        self._made: tuple[Span, ...] | None = None
        self._last: tuple[int, np.ndarray] | None = None

    @property
    def row_bytes(self) -> int:
        """Bytes of a row as stored."""
        return self.output.columns * BITS[self.output.dtype] // 8

    def read(self, first: int, count: int) -> np.ndarray:
        """Return rows as they would lie in the file: uint8 [count, bytes per row].

        Raises InputRefused as the merge does, for NaN, infinity and overflow.
        """
        out = np.empty((count, self.row_bytes), np.uint8)
        if stored := stored_copy(self.output):
            reader = self._maker.files.reader(stored.path)
            return reader.read_into(out, stored.info.start + first * self.row_bytes)
        for span in self._spans:
            start, end = max(first, span.first), min(first + count, span.first + span.count)
            if start < end:
                for at, rows in self._rows(span, start, end):
                    data = np.frombuffer(as_bytes(rows), np.uint8).reshape(len(rows), -1)
                    out[at - first : at - first + len(rows)] = data
        return out

    @property
    def _spans(self) -> tuple[Span, ...]:
        with self._lock:
            if self._made is None:
                self._made = tuple(self._maker.spans(self.output))
            return self._made

    def _rows(self, span: Span, start: int, end: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yield rows and where they begin; those of fixed blocks are cut from whole ones.

        The last of these is kept for the next call.
        """
        if not span.fixed:
            for at in range(start, end, span.step):
                yield at, span.rows(at, min(span.step, end - at))
            return
        for first, count in span.blocks():
            if first < end and start < first + count:
                with self._lock:
                    if self._last is None or self._last[0] != first:
                        self._last = (first, span.rows(first, count))
                    block = self._last[1]
                cut = block[max(start - first, 0) : end - first]
                yield max(start, first), np.ascontiguousarray(cut)
