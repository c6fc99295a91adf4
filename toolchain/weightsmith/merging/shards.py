"""Write shards: blocks are computed by several workers and written in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from weightsmith.merging.blocks import RowMaker, Settings, stored_copy
from weightsmith.merging.outputs import MergedTensor, OutputShard
from weightsmith.merging.sketch import Sketch
from weightsmith.merging.stream import Writer, as_bytes
from weightsmith.merging.tally import MergeCounts
from weightsmith.merging.virtual_weights import UnwrittenShard
from weightsmith.models.safetensors import build_header

_COPY_BYTES = 1 << 20
_AHEAD = 2
"""Blocks in flight per worker: enough to keep workers busy with little memory."""

Block = Callable[[], np.ndarray]
"""Computes the next data to write."""


class ShardMaker:
    """Writes the shards of one plan."""

    def __init__(self, settings: Settings, tally: MergeCounts) -> None:
        self._settings, self._rows = settings, RowMaker(settings, tally)
        self.files = self._rows.files
        self._second = RowMaker(settings, MergeCounts())  # its rows count nowhere
        self.sketches: dict[str, Sketch] = {}
        """Tensors with terms -> their base's projections, until a proof has used them."""
        self.pool = ThreadPoolExecutor(settings.workers, "merge")

    def close(self) -> None:
        """Stop the workers and close the files."""
        self.pool.shutdown(wait=True, cancel_futures=True)
        self.files.close()
        self._second.files.close()

    def write(self, shard: OutputShard, path: Path, progress: Callable[[int], None]) -> Writer:
        """Write a shard's tensors in order; return the writer, which must still be finished.

        `progress` is called with the bytes of each written block.
        """
        header = header_of(shard)
        writer = Writer(path, len(header) + shard.size)
        self._fill(writer, header, shard, progress)
        return writer

    def compute(
        self, shard: OutputShard, path: Path, progress: Callable[[int], None]
    ) -> UnwrittenShard:
        """Do the same with a shard of which only the header is to be written."""
        unwritten = UnwrittenShard(shard, path, self.files, self.sketches, self._again)
        self._fill(unwritten, header_of(shard), shard, progress)
        return unwritten

    def _fill(
        self,
        writer: Writer | UnwrittenShard,
        header: bytes,
        shard: OutputShard,
        progress: Callable[[int], None],
    ) -> None:
        waiting: deque[Future[np.ndarray]] = deque()
        try:
            writer.write(header)
            blocks = (block for output in shard.outputs for block in self._blocks(output))
            for block in blocks:
                waiting.append(self.pool.submit(block))
                if len(waiting) >= _AHEAD * self._settings.workers:
                    progress(self._append(writer, waiting))
            while waiting:
                progress(self._append(writer, waiting))
        except BaseException:
            for future in waiting:
                future.cancel()
            writer.abandon()
            raise
        finally:
            # Wait for workers that still compute, so that nothing leaks into the next shard.
            for future in waiting:
                if not future.cancelled():
                    future.exception()

    def _blocks(self, output: MergedTensor) -> Iterator[Block]:
        """Yield the blocks of one tensor in file order."""
        if not output.size:
            return
        if stored := stored_copy(output):
            info = stored.info
            for start in range(info.start, info.end, _COPY_BYTES):
                size = min(_COPY_BYTES, info.end - start)
                yield partial(self._copy, stored.path, start, size)
            return
        sketch = None
        if output.terms:
            sketch = self.sketches[output.name] = Sketch(output)
        for span in self._rows.spans(output, sketch):
            for first, count in span.blocks():
                yield partial(span.rows, first, count)

    def _again(self, output: MergedTensor) -> Callable[[int], np.ndarray]:
        """Return what computes single rows of a tensor; it reads the factors once."""
        spans = list(self._second.spans(output))

        def row(row: int) -> np.ndarray:
            (span,) = (one for one in spans if one.first <= row < one.first + one.count)
            return span.rows(row, 1)

        return row

    def _append(self, writer: Writer | UnwrittenShard, waiting: deque[Future[np.ndarray]]) -> int:
        """Write the oldest block; return its size in bytes."""
        block = waiting.popleft().result()
        writer.write(as_bytes(block))
        return block.nbytes

    def _copy(self, path: Path, start: int, size: int) -> np.ndarray:
        return self.files.reader(path).read_into(np.empty(size, np.uint8), start)


def header_of(shard: OutputShard) -> bytes:
    """Return what a shard's file begins with."""
    tensors = [(output.name, output.dtype, output.shape) for output in shard.outputs]
    return build_header(tensors, {"format": "pt"})
