"""Base and adapters seen as the merged checkpoint, whose rows are computed when they are read."""

from __future__ import annotations

import hashlib
import heapq
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path
from types import MappingProxyType

import numpy as np

from weightsmith.core.errors import InputRefused
from weightsmith.core.merge_options import Merge
from weightsmith.merging.blocks import MergeCounts, RowMaker, Settings, Span, stored_copy
from weightsmith.merging.kernel import check_arithmetic
from weightsmith.merging.outputs import MergedTensor
from weightsmith.merging.plan import MergePlan, make_plan
from weightsmith.merging.shards import header_of
from weightsmith.merging.stream import as_bytes
from weightsmith.models.safetensors import BITS, TensorInfo, read_header
from weightsmith.models.tensors import filled

_SOME = 4 << 20
"""Bytes that are read at a time for their digest alone."""
AT_ONCE = 8
"""Tensors whose factors stay in memory: as many should be read at the same time."""


@contextmanager
def opened(
    folder: Path,
    base: Path,
    adapters: tuple[tuple[Path, float], ...],
    options: Merge,
    digests: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[None]:
    """Compute the data of the folder's files, which have none, while the block runs.

    `digests` are the sha256 in hex of the files that some stand for: all data of these are computed
    at least once, and compared when the block ends. Raises InputRefused as the merge does and if a
    digest differs, and EnvironmentFailure as the merge does.
    """
    check_arithmetic()
    plan = make_plan(base, adapters, options)
    checkpoint = VirtualCheckpoint(plan, Settings(device="cpu", workers=1))
    files, hashed = {}, []
    for shard in plan.shards:
        file = _VirtualFile(read_header(folder / shard.name).tensors, checkpoint)
        files[folder / shard.name] = file
        if shard.name in digests:
            digest = hashlib.sha256(header_of(shard))
            order = InOrder(file.first, file.end, file.some, digest.update)
            file.seen = order.see
            hashed.append((shard.name, digest, order))
    try:
        with filled(files):
            yield
        for name, digest, order in hashed:
            order.finish()
            if (found := digest.hexdigest()) != digests[name]:
                raise InputRefused(
                    f"the weights computed from base and adapters are not those that were merged: "
                    f"{name} has sha256 {found}, not {digests[name]}",
                    hint="an input was changed while the build ran, or memory is faulty: build "
                    "again",
                )
    finally:
        for _, _, order in hashed:
            order.abandon()
        checkpoint.close()


class VirtualCheckpoint:
    """The tensors that a merge would write, with the same bits.

    Rows may be read in any order and by several threads. `close` closes the input files.
    """

    def __init__(self, plan: MergePlan, settings: Settings) -> None:
        self._maker = RowMaker(settings, MergeCounts())
        self.outputs = plan.outputs
        self._kept: OrderedDict[str, VirtualTensor] = OrderedDict()
        self._lock = threading.Lock()

    def tensor(self, name: str) -> VirtualTensor:
        """Return a tensor; the last few keep their factors. Raises KeyError."""
        with self._lock:
            tensor = self._kept.pop(name, None)
            self._kept[name] = tensor = tensor or VirtualTensor(self.outputs[name], self._maker)
            while len(self._kept) > AT_ONCE:
                self._kept.popitem(last=False)
            return tensor

    def close(self) -> None:
        """Close the input files."""
        self._maker.files.close()


class _VirtualFile:
    """A shard's data, by offset in the file that a merge would write."""

    def __init__(self, infos: tuple[TensorInfo, ...], checkpoint: VirtualCheckpoint) -> None:
        self._infos = [info for info in infos if info.size]
        self._checkpoint = checkpoint
        self.seen: Callable[[int, np.ndarray], None] = lambda *_: None
        """Gets an offset and the whole rows from there on that somebody reads."""

    @property
    def first(self) -> int:
        return self._infos[0].start if self._infos else 0

    @property
    def end(self) -> int:
        return self._infos[-1].end if self._infos else 0

    def read(self, start: int, size: int) -> np.ndarray:
        """Return bytes of tensors: uint8 [size]. Raises InputRefused as the merge does."""
        end = start + size
        parts = []
        for info in self._infos[bisect_right(self._infos, start, key=attrgetter("end")) :]:
            if info.start >= end:
                break
            tensor = self._checkpoint.tensor(info.name)
            row, first = tensor.row_bytes, max(start, info.start) - info.start
            last = min(end, info.end) - info.start
            before = first // row
            found = tensor.read(before, -(-last // row) - before).reshape(-1)
            self.seen(info.start + before * row, found)
            parts.append(found[first - before * row : last - before * row])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def some(self, start: int) -> np.ndarray:
        """Return rows of one tensor from an offset on, which nobody sees."""
        info = self._infos[bisect_right(self._infos, start, key=attrgetter("end"))]
        tensor = self._checkpoint.tensor(info.name)
        before = (start - info.start) // tensor.row_bytes
        rows = (info.end - info.start) // tensor.row_bytes - before
        return tensor.read(before, min(rows, max(1, _SOME // tensor.row_bytes))).reshape(-1)


class VirtualTensor:
    """One tensor, viewed as a matrix."""

    def __init__(self, output: MergedTensor, maker: RowMaker) -> None:
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
        with self._lock:
            if self._made is None:
                self._made = tuple(self._maker.spans(self.output))
        for span in self._made:
            start, end = max(first, span.first), min(first + count, span.first + span.count)
            if start < end:
                for at, rows in self._rows(span, start, end):
                    data = np.frombuffer(as_bytes(rows), np.uint8).reshape(len(rows), -1)
                    out[at - first : at - first + len(rows)] = data
        return out

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


_WAITING = 8
"""Pieces between the readers and the thread that takes them in order."""
_EARLY = 32 << 20
"""Bytes that may wait for data before them; then these are read for their sake."""


class InOrder:
    """Gets the pieces that others read, and passes all data on, each byte once and in order.

    What nobody reads, or only much later, it reads itself.
    """

    # It costs 1.5 CPU seconds per billion weights, on a thread of its own. A digest per tensor
    # would be one more for the merge to compute; a cheaper sum, one more to keep, which no signed
    # statement names.

    def __init__(
        self,
        first: int,
        end: int,
        read: Callable[[int], np.ndarray],
        take: Callable[[memoryview], None],
    ) -> None:
        """Pass on the bytes from `first` to `end`; `read` returns some from an offset on."""
        self._next, self._end, self._read, self._pass_on = first, end, read, take
        self._early: list[tuple[int, int, np.ndarray]] = []
        self._held = self._count = 0
        self._error: BaseException | None = None
        self._room = threading.BoundedSemaphore(_WAITING)
        self._thread = ThreadPoolExecutor(1, "in-order")

    def see(self, start: int, data: np.ndarray) -> None:
        """Take what a reader has got: uint8, from an offset on; it must not change any more."""
        self._room.acquire()
        self._thread.submit(self._work, self._add, start, data)

    def finish(self) -> None:
        """Pass on what is left; raises what reading or taking raised."""
        self._thread.submit(self._work, self._complete)
        self._thread.shutdown()
        if self._error:
            raise self._error

    def abandon(self) -> None:
        """Stop."""
        self._thread.shutdown(cancel_futures=True)

    def _work(self, what: Callable[..., None], *given: object) -> None:
        try:
            if self._error is None:
                what(*given)
        except BaseException as error:  # noqa: BLE001 - raised by `finish`
            self._error = error
            self._early.clear()
        finally:
            if given:
                self._room.release()

    def _add(self, start: int, data: np.ndarray) -> None:
        self._count += 1  # no two entries compare their arrays
        heapq.heappush(self._early, (start, self._count, data))
        self._held += data.nbytes
        self._drain()
        while self._held > _EARLY:
            self._fill()

    def _complete(self) -> None:
        while self._next < self._end:
            self._fill()

    def _fill(self) -> None:
        self._pass(self._next, self._read(self._next))
        self._drain()

    def _drain(self) -> None:
        while self._early and self._early[0][0] <= self._next:
            start, _, data = heapq.heappop(self._early)
            self._held -= data.nbytes
            self._pass(start, data)

    def _pass(self, start: int, data: np.ndarray) -> None:
        if (new := data[self._next - start :]).size:
            self._pass_on(as_bytes(new))
            self._next += new.nbytes
