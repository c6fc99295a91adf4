"""Read back a written shard and check that it was computed and written correctly.

Two checks cover every byte. A checksum of the bytes (a projection onto random odd numbers), taken
while writing, is compared with the file's: a single wrong byte always changes it. And each merged
tensor, projected onto random vectors, is compared with the projections of base and factors
(Freivalds, "Probabilistic machines can use less running time", 1977), row by row, which detects a
wrong scaling, order, position or transposition. The base's are taken while it is merged
(`Sketch`); suspicious rows and a few random ones are read again and recomputed in float64.

Reading the whole base again would only add that a few wrongly read rows are found; sixteen rows per
tensor miss a damaged block; a second sha256 does not check the sums; recomputing every element
doubles the work.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, wait
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from typing import TypeAlias

import numpy as np

from weightsmith.core.errors import CheckFailed
from weightsmith.merging import native
from weightsmith.merging.outputs import MergedTensor, OutputShard, StoredTensor, Term
from weightsmith.merging.rounding import F32, F64, FORMATS, round_once
from weightsmith.merging.stream import ARRAY_TYPES, Checksum, OpenFiles, Reader, as_bytes, continued
from weightsmith.models.safetensors import TensorInfo, read_header

ROWS = 16
"""Random rows per tensor that are recomputed element by element."""
BLOCK = 1 << 19
"""Elements read and checked at once: they stay in the second-level cache."""
_COPY = 1 << 20
_SIGMAS = 6.0
"""Deviation of a row's projection, in standard deviations of rounding, to be recomputed."""
_VECTORS = 2
"""Random vectors per tensor: a single one misses about one wrong row in a hundred."""


class Sketch:
    """A base's rows times random signs, taken while they are merged, so that they are read once."""

    def __init__(self, output: MergedTensor) -> None:
        random = np.random.default_rng(_seed_of(output.name))
        work = F64 if ARRAY_TYPES[output.dtype] == F32 else F32
        self.signs = random.integers(0, 2, (_VECTORS, output.columns)).astype(work) * 2 - 1
        """(vectors, columns), of a wider type than the result's."""
        self.products = np.full((output.rows, _VECTORS), np.nan)
        """(rows, vectors); NaN for rows that were never added: the proof recomputes these."""
        self.moved = output.kind == "replaced"
        """Whether any row of the result differs from the base's bits."""

    def add(self, first: int, base: np.ndarray, made: np.ndarray) -> None:
        """Take rows of the base from `first` on, and what was made of them."""
        self.moved = self.moved or differ(base, made)
        self.products[first : first + len(base)] = project(base, self.signs)[1]


def project(rows: np.ndarray, signs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return each row's sum of squares, (rows,), and its products with signs, (rows, vectors)."""
    if (made := native.project_rows(rows, signs)) is not None:
        return made
    wide = rows.astype(signs.dtype)
    # One vector at a time: products with narrow matrices are slow.
    return np.vecdot(wide, wide), np.stack([wide @ some for some in signs], 1)


def differ(base: np.ndarray, found: np.ndarray) -> bool:
    """Return whether a result differs from the base rounded to the result's dtype."""
    if base.dtype != found.dtype:
        base = round_once(base.astype(F64), found.dtype)
    return not np.array_equal(base.view(_bits_of(base)), found.view(_bits_of(found)))


def _bits_of(array: np.ndarray) -> np.dtype:
    """Return the unsigned integers of an array's size, to compare bits."""
    return np.dtype(f"u{array.dtype.itemsize}")


def _seed_of(name: str) -> int:
    """Return a seed from the tensor's name, so that a failure is reproducible."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Written:
    output: MergedTensor
    info: TensorInfo
    checksums: tuple[Checksum, ...]
    """Checksums of its bytes, taken while writing."""
    reader: Reader
    files: OpenFiles
    """The inputs."""
    sketch: Sketch | None

    def row(self, row: int) -> np.ndarray:
        return self.reader.rows(self.info, row, 1, self.output.columns)

    def pieces(self) -> Iterator[tuple[int, np.ndarray]]:
        """Read all bytes once, and check them against their checksums.

        Yields pieces of whole rows with the index of their first row.
        """
        row = self.info.size // self.output.rows
        step = max(1, BLOCK // self.output.columns)
        # Four rows are a multiple of 8 bytes, as checksums need it.
        most = row * (step - step % 4 if step > 4 else 4)
        for start, data in _checked_blocks(self.reader, self.checksums, most):
            piece = data.view(ARRAY_TYPES[self.info.dtype])
            yield (start - self.info.start) // row, piece.reshape(-1, self.output.columns)


@dataclass(frozen=True, slots=True, kw_only=True)
class Passing:
    """A tensor that is checked while it is computed."""

    output: MergedTensor
    files: OpenFiles
    sketch: Sketch | None
    blocks: Queue[np.ndarray | None]
    """All rows in order, each (rows, columns); then None."""
    row: Callable[[int], np.ndarray]
    """Compute one row, (1, columns)."""

    def pieces(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the blocks in pieces that stay in a CPU's cache, with their first rows."""
        first, step = 0, max(1, BLOCK // self.output.columns)
        while (block := self.blocks.get()) is not None:
            for at in range(0, len(block), step):
                yield first + at, block[at : at + step]
            first += len(block)


Tested: TypeAlias = _Written | Passing


def prove(
    shard: OutputShard,
    path: Path,
    checksums: tuple[Checksum, ...],
    sketches: dict[str, Sketch],
    files: OpenFiles,
    pool: Executor,
) -> tuple[str, ...]:
    """Check a written shard against its plan; return changed tensors that equal the base's bits.

    `checksums` and `sketches` were taken while writing. Checksums are in file order: first the
    header's, then each tensor's, in whole rows if the tensor is changed. Sketches, of tensors with
    terms, are taken out of their dictionary. Raises CheckFailed with the first wrong tensor or the
    file.
    """
    reader, left = Reader(path), deque(checksums)
    checks: list[tuple[str, Future[bool]]] = []
    try:
        infos = {info.name: info for info in read_header(path).tensors}
        expected = [(output.name, output.dtype, tuple(output.shape)) for output in shard.outputs]
        if sorted(expected) != sorted((i.name, i.dtype, i.shape) for i in infos.values()):
            raise CheckFailed(
                f"{path.name} was written wrongly: its header differs from the plan",
                hint="memory or disk may be faulty: merge again, on another machine if it recurs",
            )
        _check_bytes(reader, (left.popleft(),))
        for output in shard.outputs:
            if output.size:
                info, own = infos[output.name], []
                while left and left[0].start < info.end:
                    own.append(left.popleft())
                written = _Written(
                    output=output,
                    info=info,
                    checksums=tuple(own),
                    reader=reader,
                    files=files,
                    sketch=sketches.pop(output.name, None),
                )
                checks.append((output.name, pool.submit(_check, written)))
        return tuple(name for name, moved in checks if not moved.result())
    finally:
        for _, moved in checks:
            moved.cancel()
        wait([moved for _, moved in checks])
        reader.close()


def _checked_blocks(
    reader: Reader, checksums: Iterable[Checksum], most: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the file's bytes, at most `most` of a written block at once; a multiple of 8.

    Raises CheckFailed after a block with a wrong checksum.
    """
    for checksum in checksums:
        value, end = 0, checksum.start + checksum.size
        for start in range(checksum.start, end, most):
            data = reader.read_into(np.empty(min(end - start, most), np.uint8), start)
            value = continued(value, as_bytes(data), start - checksum.start)
            yield start, data
        if value != checksum.value:
            raise CheckFailed(
                f"{reader.path.name} differs from what was written between bytes "
                f"{checksum.start} and {end}",
                hint="the disk may be faulty: merge again, to another disk if it recurs",
            )


def _check_bytes(reader: Reader, checksums: tuple[Checksum, ...]) -> None:
    for _ in _checked_blocks(reader, checksums, _COPY):
        pass


def _check(written: _Written) -> bool:
    if written.output.change is not None:
        _check_bytes(written.reader, written.checksums)
        return _recompute(written)
    source = written.output.source
    if written.output.as_is and isinstance(source, StoredTensor):
        reader = written.files.reader(source.path)
        for start, data in _checked_blocks(written.reader, written.checksums, _COPY):
            place = source.info.start + start - written.info.start
            off = reader.read_into(np.empty_like(data), place) != data
            if off.any():
                raise _wrong(written.output, int(off.sum()), len(data))
        return True
    return is_changed(written)


def is_changed(tested: Tested) -> bool:
    """Check a tensor without `change`; return whether it differs from the base's bits.

    Raises CheckFailed with the tensor's name.
    """
    sketch = tested.sketch
    return _compare_values(tested) if sketch is None else _project(tested, sketch)


def _project(written: Tested, sketch: Sketch) -> bool:
    """Compare W'x with Wx + Σ factor · B(Ax) for random signs x; recompute suspicious rows."""
    output = written.output
    # A row that is never filled in is recomputed.
    squares, products = np.full(output.rows, np.nan), np.empty(sketch.products.shape)
    for first, found in written.pieces():
        place = slice(first, first + len(found))
        squares[place], products[place] = project(found, sketch.signs)
    # Only now, since the sketch may have been filled piece by piece as well.
    expected, files = sketch.products.copy(), written.files
    factors = [
        _Factors(term, files.matrix(term.left), files.matrix(term.right)) for term in output.terms
    ]
    for some in factors:
        some.projected(sketch.signs.T.astype(F64), expected)
    # A rounding error is uniform up to half a unit, so its variance is a third of its square.
    form = FORMATS[ARRAY_TYPES[output.dtype]]
    size = squares * 4.0**-form.precision / 3
    size += output.columns * 4.0 ** (form.least - form.precision)
    off = np.abs(products - expected).max(1)
    fine = (off <= _SIGMAS * np.sqrt(size)) & np.isfinite(size)
    suspicious = sorted(_some_rows(output).union(np.flatnonzero(~fine).tolist()))
    for at in range(0, len(suspicious), ROWS):
        _compare_rows(written, factors, suspicious[at : at + ROWS])
    return sketch.moved


def _some_rows(output: MergedTensor) -> set[int]:
    """Return the rows to recompute in any case, which nothing of the merge knows."""
    random = np.random.default_rng((_seed_of(output.name), ROWS))
    return set(random.integers(0, output.rows, ROWS).tolist())


def _compare_rows(written: Tested, factors: list[_Factors], rows: list[int]) -> None:
    total = np.concatenate([_source_row(written.output, written.files, row) for row in rows])
    for some in factors:
        some.add_rows(np.array(rows), total)
    found = np.concatenate([written.row(row) for row in rows])
    _compare(written.output, total, found)


@dataclass(frozen=True, slots=True)
class _Factors:
    term: Term
    left: np.ndarray
    right: np.ndarray

    def projected(self, signs: np.ndarray, into: np.ndarray) -> None:
        step = max(1, BLOCK // self.right.shape[1])
        inner = [
            self.right[at : at + step].astype(F64) @ signs for at in range(0, self.term.rank, step)
        ]
        product = self.term.factor * np.concatenate(inner)
        step = max(1, BLOCK // self.left.shape[1])
        for first in range(0, len(self.left), step):
            part = self.left[first : first + step].astype(F64)
            place = self.term.first + first
            into[place : place + len(part)] += part @ product

    def add_rows(self, rows: np.ndarray, total: np.ndarray) -> None:
        """Add its part to some rows of the output, (rows, columns), in float64."""
        own = np.flatnonzero((rows >= self.term.first) & (rows < self.term.first + len(self.left)))
        left = self.left[rows[own] - self.term.first].astype(F64)
        step = max(1, BLOCK // self.right.shape[1])
        for at in range(0, self.term.rank, step):
            part = slice(at, at + step)
            total[own] += self.term.factor * (left[:, part] @ self.right[part].astype(F64))


def _source_row(output: MergedTensor, files: OpenFiles, row: int) -> np.ndarray:
    for patch in reversed(output.patches):
        if row in patch.places:
            place = len(patch.places) - 1 - patch.places[::-1].index(row)
            return patch.stored.rows(files, place, 1, output.columns).astype(F64)
    return output.source.rows(files, row, 1, output.columns).astype(F64)


def _compare(output: MergedTensor, expected: np.ndarray, found: np.ndarray) -> None:
    """Compare with a tolerance of half a unit plus the error of float64."""
    form = FORMATS[found.dtype]
    size = np.abs(expected)
    room = size * 2.0**-form.precision * (1 + 2.0**-20) + 2.0 ** (form.least - form.precision)
    # For sums that cancel, the error is relative to the row's largest value.
    room += size.max(1, keepdims=True) * 2.0**-40
    off = np.abs(found.astype(F64) - expected) > room
    if off.any() or not np.isfinite(found).all():
        raise _wrong(output, int(off.sum()), off.size)


def _recompute(written: _Written) -> bool:
    """Recompute some rows of a change; return whether any row differs from the base's bits.

    A change that cannot be computed row by row is not recomputed, because that would take as long
    as the merge; only its checksums are checked.
    """
    output, files = written.output, written.files
    if output.change is None or not output.change.by_row:
        return True
    rows, moved = output.change.begin(output, files), False
    for row in sorted(_some_rows(output)):
        found = written.row(row)
        _compare(output, rows(row, 1), found)
        moved = moved or differ(output.source.rows(files, row, 1, output.columns), found)
    step = max(1, BLOCK // output.columns)
    for first in range(0, 0 if moved else output.rows, step):
        count = min(step, output.rows - first)
        base = output.source.rows(files, first, count, output.columns)
        if differ(base, written.reader.rows(written.info, first, count, output.columns)):
            return True
    return moved


def _compare_values(written: Tested) -> bool:
    """Compare every element with the source, cast and patched; return whether a patch differs."""
    output, files = written.output, written.files
    moved = not output.patches
    for patch in output.patches:
        for row in patch.places:
            base = output.source.rows(files, row, 1, output.columns)
            moved = moved or differ(base, written.row(row))
    patched = {row for patch in output.patches for row in patch.places}
    for first, found in written.pieces():
        count = len(found)
        expected = output.source.rows(files, first, count, output.columns).astype(F64)
        for row in patched & set(range(first, first + count)):
            expected[row - first] = _source_row(output, files, row)[0]
        off = round_once(expected, found.dtype).view(_bits_of(found)) != found.view(_bits_of(found))
        off &= ~np.isnan(expected)
        if off.any():
            raise _wrong(output, int(off.sum()), off.size)
    return moved


def _wrong(output: MergedTensor, off: int, size: int) -> CheckFailed:
    return CheckFailed(
        f"{output.name} was written wrongly: {off} of {size} compared elements differ",
        hint="memory or disk may be faulty: merge again, on another machine if it recurs",
    )
