"""The written file, read back: nothing but what was computed, and computed rightly.

Two checks together leave no byte out. A projection of the bytes onto random odd numbers, taken
while they were written, is taken again from the file: one wrong byte always changes it. And each
merged tensor, projected onto a random vector, is compared with the projections of base and factors
(Freivalds, "Probabilistic machines can use less running time", 1977), row by row, which a wrong
scaling, order, place or transposition cannot pass; a row that looks odd is recomputed in float64,
and so are a few more.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from toolchain.checkpoints.safetensors import TensorInfo, read_header
from toolchain.errors import CheckFailed
from toolchain.merging.outputs import Output, OutputShard, Patch, Stored, Term
from toolchain.merging.rounding import BF16, F16, F32, F64, FORMATS, round_once
from toolchain.merging.stream import Checksum, Files, Reader, as_bytes

ROWS = 16
"""Rows per tensor that are recomputed element by element."""
_BLOCK = 1 << 18
"""Elements per block."""
_COPY = 1 << 20
_VECTORS = 2
"""Random vectors per tensor: one alone misses a wrong row in about a hundred."""
_SIGMAS = 6.0
"""How odd a row's projection must be, in standard deviations of its roundings, to be recomputed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """What reading back a shard showed beside being right."""

    unchanged: tuple[str, ...]
    """Tensors that an adapter changes and that came out as the base's bits."""


def prove(
    shard: OutputShard,
    path: Path,
    checksums: tuple[Checksum, ...],
    files: Files,
    pool: Executor,
    *,
    exact: bool,
) -> Proof:
    """Check a written shard against its plan; `checksums` are those of the bytes as computed.

    Raises CheckFailed naming the first tensor that is off, or the file.
    """
    reader = Reader(path)
    try:
        infos = _headers(shard, path)
        _same_bytes(reader, checksums, pool)
        checks = [
            _check(output, infos[output.name], files, reader, exact=exact)
            for output in shard.outputs
            if output.size
        ]
        changed = list(pool.map(lambda check: check(), checks))
    finally:
        reader.close()
    names = [output.name for output in shard.outputs if output.size]
    return Proof(
        unchanged=tuple(name for name, moved in zip(names, changed, strict=True) if not moved)
    )


def _headers(shard: OutputShard, path: Path) -> dict[str, TensorInfo]:
    """Read the written table of contents, and compare it with the plan."""
    infos = read_header(path).tensors
    wanted = [(output.name, output.dtype, tuple(output.shape)) for output in shard.outputs]
    if sorted(wanted) != sorted((info.name, info.dtype, info.shape) for info in infos):
        raise CheckFailed(
            f"{path.name} was written wrong: its header is not what was planned",
            hint="memory or disk may be faulty: merge again, on another machine if it recurs",
        )
    return {info.name: info for info in infos}


def _same_bytes(reader: Reader, checksums: tuple[Checksum, ...], pool: Executor) -> None:
    """Take the projection of the bytes again, block by block as they were written."""

    def same(checksum: Checksum) -> bool:
        data = reader.read_into(np.empty(checksum.size, np.uint8), checksum.start)
        return Checksum.of(as_bytes(data), checksum.start) == checksum

    for right, checksum in zip(pool.map(same, checksums), checksums, strict=True):
        if not right:
            raise CheckFailed(
                f"{reader.path.name} holds other bytes than were written between "
                f"{checksum.start} and {checksum.start + checksum.size}",
                hint="the disk may be faulty: merge again, to another disk if it recurs",
            )


def _check(
    output: Output, info: TensorInfo, files: Files, reader: Reader, *, exact: bool
) -> Callable[[], bool]:
    """Return what checks one tensor, and says whether it differs from the base's bits."""
    if output.terms:
        return lambda: _project(output, info, files, reader, exact=exact)
    if output.change is not None:
        return lambda: _recompute(output, info, files, reader)
    return lambda: _compare_all(output, info, files, reader)


def _project(
    output: Output, info: TensorInfo, files: Files, reader: Reader, *, exact: bool
) -> bool:
    """Compare W'x with Wx + Σ factor · B(Ax), x random signs; recompute rows that look odd."""
    work = F64 if output.dtype == "F32" else F32
    random = np.random.default_rng(_seed(output.name))
    signs = random.integers(0, 2, (_VECTORS, output.columns)).astype(work) * 2 - 1
    factors = _loaded(output, files)
    wanted = np.zeros((output.rows, _VECTORS))
    for some in factors:
        some.projected(signs.T.astype(F64), wanted)
    sample = set(random.integers(0, output.rows, ROWS).tolist())
    odd: list[int] = []
    moved = output.kind == "replaced"
    step = max(1, _BLOCK // output.columns)
    form = FORMATS[_dtype(output)]
    for first in range(0, output.rows, step):
        count = min(step, output.rows - first)
        base = output.source.rows(files, first, count, output.columns)
        found = reader.rows(info, first, count, output.columns)
        moved = moved or _differ(base, found)
        wide = found.astype(work)
        # A rounding is off by at most half a unit: uniform, its variance is a third of its square.
        size = np.einsum("ij,ij->i", wide, wide) * 4.0**-form.precision / 3
        wide -= base.astype(work)
        # One vector at a time: numpy is slow with narrow matrices.
        off = np.stack([wide @ some for some in signs], 1) - wanted[first : first + count]
        size += output.columns * 4.0 ** (form.least - form.precision)
        fine = (np.abs(off).max(1) <= _SIGMAS * np.sqrt(size)) & np.isfinite(size)
        rows = np.flatnonzero(~fine) + first
        odd += rows.tolist()
    for row in sorted(sample | set(odd)):
        total = _source_row(output, files, row)
        for some in factors:
            some.add_row(row, total)
        _compare(output, total, reader.rows(info, row, 1, output.columns), exact)
    return moved


@dataclass(frozen=True, slots=True)
class _Factors:
    """A term with its matrices in memory."""

    term: Term
    left: np.ndarray
    right: np.ndarray

    def projected(self, signs: np.ndarray, into: np.ndarray) -> None:
        """Add factor · B(Ax) of its rows, in float64."""
        step = max(1, _BLOCK // self.left.shape[1])
        inner = self.right.astype(F64) @ signs
        for first in range(0, len(self.left), step):
            part = self.left[first : first + step].astype(F64)
            place = self.term.first + first
            into[place : place + len(part)] += self.term.factor * (part @ inner)

    def add_row(self, row: int, total: np.ndarray) -> None:
        """Add its part of one row of the output, (1, columns), in float64."""
        at = row - self.term.first
        if 0 <= at < len(self.left):
            product = self.left[at : at + 1].astype(F64) @ self.right.astype(F64)
            total += self.term.factor * product


def _loaded(output: Output, files: Files) -> list[_Factors]:
    return [
        _Factors(
            term,
            files.matrix(term.left),
            np.ones((1, 1)) if term.right is None else files.matrix(term.right),
        )
        for term in output.terms
    ]


def _source_row(output: Output, files: Files, row: int) -> np.ndarray:
    for patch in reversed(output.patches):
        if row in patch.places:
            return _patched(patch, files, row, output.columns)
    return output.source.rows(files, row, 1, output.columns).astype(F64)


def _patched(patch: Patch, files: Files, row: int, columns: int) -> np.ndarray:
    place = len(patch.places) - 1 - patch.places[::-1].index(row)
    return patch.stored.rows(files, place, 1, columns).astype(F64)


def _compare(output: Output, wanted: np.ndarray, found: np.ndarray, exact: bool) -> None:
    """Allow half a unit in the last place, and what float64 or, for `fast`, float32 may be off."""
    form = FORMATS[found.dtype]
    size = np.abs(wanted)
    room = size * 2.0**-form.precision * (1 + 2.0**-20) + 2.0 ** (form.least - form.precision)
    # Sums that cancel are off by a part of what went in, which the row's largest value bounds.
    room += size.max(1, keepdims=True) * (2.0**-40 if exact else 2.0**-16)
    off = np.abs(found.astype(F64) - wanted) > room
    if off.any() or not np.isfinite(found).all():
        raise _wrong(output, int(off.sum()), off.size)


def _recompute(output: Output, info: TensorInfo, files: Files, reader: Reader) -> bool:
    """Compute some rows of a change again; say whether any differs from the base's bits.

    A change that needs the whole tensor is as long as the merge: its bytes are known to be those
    that were computed, and that is all.
    """
    if output.change is None or output.change.whole:
        return True
    rows, moved = output.change.begin(output, files), False
    random = np.random.default_rng(_seed(output.name))
    for row in sorted(set(random.integers(0, output.rows, ROWS).tolist())):
        found = reader.rows(info, row, 1, output.columns)
        _compare(output, rows(row, 1), found, True)
        moved = moved or _differ(output.source.rows(files, row, 1, output.columns), found)
    return moved


def _compare_all(output: Output, info: TensorInfo, files: Files, reader: Reader) -> bool:
    """Compare every byte with the source's, cast and patched where that was asked."""
    if output.as_is and isinstance(output.source, Stored):
        source, size = output.source.info, info.size
        for at in range(0, size, _COPY):
            count = min(_COPY, size - at)
            old = files.reader(output.source.path).read_into(
                np.empty(count, np.uint8), source.start + at
            )
            new = reader.read_into(np.empty(count, np.uint8), info.start + at)
            if not np.array_equal(old, new):
                raise _wrong(output, int((old != new).sum()), count)
        return True
    moved = not output.patches
    for patch in output.patches:
        for row in patch.places:
            moved = moved or _differ(
                output.source.rows(files, row, 1, output.columns),
                reader.rows(info, row, 1, output.columns),
            )
    patched = {row for patch in output.patches for row in patch.places}
    step = max(1, _BLOCK // max(1, output.columns))
    for first in range(0, output.rows, step):
        count = min(step, output.rows - first)
        wanted = output.source.rows(files, first, count, output.columns).astype(F64)
        for row in patched & set(range(first, first + count)):
            wanted[row - first] = _source_row(output, files, row)[0]
        found = reader.rows(info, first, count, output.columns)
        off = round_once(wanted, found.dtype).view(_bits(found)) != found.view(_bits(found))
        off &= ~np.isnan(wanted)
        if off.any():
            raise _wrong(output, int(off.sum()), off.size)
    return moved


def _differ(base: np.ndarray, found: np.ndarray) -> bool:
    """Say whether any bit of a result differs from the base's, rounded to the result's type."""
    if base.dtype != found.dtype:
        base = round_once(base.astype(F64), found.dtype)
    return not np.array_equal(base.view(_bits(base)), found.view(_bits(found)))


def _bits(array: np.ndarray) -> np.dtype:
    return np.dtype(f"u{array.dtype.itemsize}")


def _dtype(output: Output) -> np.dtype:
    return {"BF16": BF16, "F16": F16, "F32": F32}[output.dtype]


def _seed(name: str) -> int:
    """Draw by the tensor's name, so that a failure can be seen again."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little")


def _wrong(output: Output, off: int, size: int) -> CheckFailed:
    return CheckFailed(
        f"{output.name} was written wrong: {off} of {size} elements that were compared differ",
        hint="memory or disk may be faulty: merge again, on another machine if it recurs",
    )
