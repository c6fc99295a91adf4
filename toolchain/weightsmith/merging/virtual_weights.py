"""A shard that is computed, hashed and checked, of which only the header is written."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Full, Queue
from typing import Any

import numpy as np

from weightsmith.merging.outputs import MergedTensor, OutputShard, StoredTensor
from weightsmith.merging.proof import BLOCK, is_changed
from weightsmith.merging.sketch import Sketch
from weightsmith.merging.stream import ARRAY_TYPES, OpenFiles, Writer
from weightsmith.models.safetensors import NO_DATA, build_header
from weightsmith.models.tensors import largest

_WAITING = 4
"""Blocks between the computation and the check."""
_PAUSE = 0.2
"""Seconds after which a full queue is tried again, in case the check has failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Passing:
    """A tensor that is checked while it is computed."""

    output: MergedTensor
    files: OpenFiles
    sketch: Sketch | None
    blocks: Iterator[np.ndarray]
    """All rows in order, each (rows, columns)."""
    again: Callable[[int], np.ndarray]
    """Compute one row, (1, columns)."""

    def row(self, row: int) -> np.ndarray:
        """Compute one row."""
        return self.again(row)

    def pieces(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the blocks in pieces that stay in a CPU's cache, with their first rows."""
        first, step = 0, max(1, BLOCK // self.output.columns)
        for block in self.blocks:
            for at in range(0, len(block), step):
                yield first + at, block[at : at + step]
            first += len(block)


class UnwrittenShard:
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
        self._shard, self._files, self._again = shard, files, again
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
            self._take(np.frombuffer(data, np.uint8))
        self.size += len(data)

    def finish(self) -> dict[str, Any]:
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

    def _take(self, data: np.ndarray) -> None:
        if not self._rest:
            self._begin(next(self._left))
        self._rest -= len(data)
        if self._output is not None and self._queue is not None:
            block = data.view(ARRAY_TYPES[self._output.dtype])
            self._put(block.reshape(-1, self._output.columns))
            if len(self._output.shape) == 2:
                name = self._output.name
                self.largest[name] = max(self.largest.get(name, 0.0), largest(block))
            if not self._rest:
                self._put(None)
                self._queue = None

    def _begin(self, output: MergedTensor) -> None:
        self._output, self._rest, self._queue = output, output.size, None
        if output.as_is and isinstance(output.source, StoredTensor):
            return
        queue = self._queue = Queue(_WAITING)
        self._checks.append((output.name, self._checker.submit(self._check, output, queue)))

    def _check(self, output: MergedTensor, queue: Queue[np.ndarray | None]) -> bool:
        passing = Passing(
            output=output,
            files=self._files,
            sketch=self._sketches.pop(output.name, None),
            blocks=_taken(queue),
            again=self._again(output),
        )
        return is_changed(passing)

    def _put(self, block: np.ndarray | None) -> None:
        """Pass a block on, unless its check has failed."""
        queue, (_, check) = self._queue, self._checks[-1] if self._checks else ("", None)
        while queue is not None and check is not None and not check.done():
            with suppress(Full):
                queue.put(block, timeout=_PAUSE)
                return


def _taken(queue: Queue[np.ndarray | None]) -> Iterator[np.ndarray]:
    while (block := queue.get()) is not None:
        yield block
