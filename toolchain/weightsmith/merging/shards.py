"""Write shards: blocks are computed by several workers and written in order."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from queue import Full, Queue
from typing import TypeVar

import numpy as np

from weightsmith.core.values import JsonValue
from weightsmith.merging.blocks import MergeCounts, RowMaker, Settings, stored_copy
from weightsmith.merging.outputs import MergedTensor, OutputShard, StoredTensor
from weightsmith.merging.proof import Passing, Sketch, is_changed
from weightsmith.merging.stream import ARRAY_TYPES, OpenFiles, Writer, as_bytes
from weightsmith.models.safetensors import NO_DATA, build_header
from weightsmith.models.tensors import largest

_COPY_BYTES = 1 << 20
_AHEAD = 2
"""Blocks in flight per worker: enough to keep workers busy with little memory."""

Block = Callable[[], np.ndarray]
"""Computes the next data to write."""
_Sink = TypeVar("_Sink", Writer, "HeaderOnlyShard")


class ShardMaker:
    """Writes the shards of one plan."""

    def __init__(self, settings: Settings, tally: MergeCounts, *, proven: bool = True) -> None:
        """Prepare; shards that are not `proven` are compared with known digests instead."""
        self._settings, self._rows, self._proven = settings, RowMaker(settings, tally), proven
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
        return self._filled(Writer(path, len(header) + shard.size), header, shard, progress)

    def compute(
        self, shard: OutputShard, path: Path, progress: Callable[[int], None]
    ) -> HeaderOnlyShard:
        """Do the same with a shard of which only the header is to be written."""
        headers_only = HeaderOnlyShard(shard, path, self.files, self.sketches, self._row_maker)
        return self._filled(headers_only, header_of(shard), shard, progress)

    def _filled(
        self, writer: _Sink, header: bytes, shard: OutputShard, progress: Callable[[int], None]
    ) -> _Sink:
        waiting: deque[Future[np.ndarray]] = deque()

        def append() -> None:
            block = waiting.popleft().result()
            writer.write(as_bytes(block))
            progress(block.nbytes)

        try:
            writer.write(header)
            for block in (block for output in shard.outputs for block in self._blocks(output)):
                waiting.append(self.pool.submit(block))
                if len(waiting) >= _AHEAD * self._settings.workers:
                    append()
            while waiting:
                append()
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
        return writer

    def _blocks(self, output: MergedTensor) -> Iterator[Block]:
        if not output.size:
            return
        if stored := stored_copy(output):
            info, reader = stored.info, self.files.reader(stored.path)
            for start in range(info.start, info.end, _COPY_BYTES):
                size = min(_COPY_BYTES, info.end - start)
                yield partial(reader.read_into, np.empty(size, np.uint8), start)
            return
        sketch = None
        if output.terms and self._proven:
            sketch = self.sketches[output.name] = Sketch(output)
        for span in self._rows.spans(output, sketch):
            for first, count in span.blocks():
                yield partial(span.rows, first, count)

    def _row_maker(self, output: MergedTensor) -> Callable[[int], np.ndarray]:
        """Return what computes single rows of a tensor; it reads the factors once."""
        spans = list(self._second.spans(output))

        def row(row: int) -> np.ndarray:
            (span,) = (one for one in spans if one.first <= row < one.first + one.count)
            return span.rows(row, 1)

        return row


def header_of(shard: OutputShard) -> bytes:
    """Return what a shard's file begins with."""
    tensors = [(output.name, output.dtype, output.shape) for output in shard.outputs]
    return build_header(tensors, {"format": "pt"})


_WAITING = 4
"""Blocks between the computation and the check."""
_PAUSE = 0.2
"""Seconds after which a full queue is tried again, in case the check has failed."""


class HeaderOnlyShard:
    """Takes a shard's bytes as `Writer` does, and writes a header without data.

    The sha256 is that of the file that a merge would write, and each tensor is checked as one that
    was read back (`proof`), except for copies, which nothing computes.
    """

    def __init__(
        self,
        shard: OutputShard,
        path: Path,
        files: OpenFiles,
        sketches: dict[str, Sketch],
        again: Callable[[MergedTensor], Callable[[int], np.ndarray]],
    ) -> None:
        self.path, self.size = path, 0
        self.unchanged: list[str] = []
        self.largest: dict[str, float] = {}
        """Computed matrices -> their largest magnitude."""
        self._shard, self._files, self._row_maker = shard, files, again
        self._sketches = sketches
        self._hash = hashlib.sha256()
        self._left = iter([output for output in shard.outputs if output.size])
        self._output: MergedTensor | None = None
        self._rest = 0
        self._checker = ThreadPoolExecutor(1, "check")
        self._checks: list[tuple[str, Future[bool]]] = []
        self._queue: Queue[np.ndarray | None] | None = None

    def write(self, data: bytes | memoryview) -> None:
        """Take the header, then a block of a tensor at a time."""
        self._hash.update(data)
        if self.size:
            if not self._rest:
                self._begin(next(self._left))
            self._rest -= len(data)
            if self._output is not None and self._queue is not None:
                block = np.frombuffer(data, ARRAY_TYPES[self._output.dtype])
                self._put(block.reshape(-1, self._output.columns))
                if len(self._output.shape) == 2:
                    name = self._output.name
                    self.largest[name] = max(self.largest.get(name, 0.0), largest(block))
                if not self._rest:
                    self._put(None)
                    self._queue = None
        self.size += len(data)

    def finish(self) -> dict[str, JsonValue]:
        """Write the file; return its name, and size and sha256 of the file that it stands for.

        Its own are in `header`. Raises CheckFailed for a tensor that was computed wrongly.
        """
        self._checker.shutdown()
        self.unchanged = [name for name, changed in self._checks if not changed.result()]
        tensors = [(output.name, output.dtype, output.shape) for output in self._shard.outputs]
        writer = Writer(self.path)
        writer.write(build_header(tensors, NO_DATA))
        own = writer.finish()
        return {
            "file": own["file"],
            "size": self.size,
            "sha256": self._hash.hexdigest(),
            "header": own,
        }

    def abandon(self) -> None:
        """Stop the checks."""
        self._put(None)
        self._checker.shutdown(cancel_futures=True)

    def _begin(self, output: MergedTensor) -> None:
        self._output, self._rest, self._queue = output, output.size, None
        if output.as_is and isinstance(output.source, StoredTensor):
            return
        queue = self._queue = Queue(_WAITING)

        def check() -> bool:
            passing = Passing(
                output=output,
                files=self._files,
                sketch=self._sketches.pop(output.name, None),
                blocks=queue,
                row=self._row_maker(output),
            )
            return is_changed(passing)

        self._checks.append((output.name, self._checker.submit(check)))

    def _put(self, block: np.ndarray | None) -> None:
        queue, (_, check) = self._queue, self._checks[-1] if self._checks else ("", None)
        while queue is not None and check is not None and not check.done():
            with suppress(Full):
                queue.put(block, timeout=_PAUSE)
                return
