"""Compute the rows of a merge's tensors, in blocks that any thread may compute."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from weightsmith.core.errors import InputRefused
from weightsmith.core.small_floats import as_float, is_finite
from weightsmith.core.values import Json, JsonValue
from weightsmith.merging.kernel import (
    PIECE,
    PreparedAddition,
    Space,
    finish_rows,
    merge_rows,
    prepare,
)
from weightsmith.merging.outputs import Band, MergedTensor, Patch, Rows, StoredTensor, bands
from weightsmith.merging.proof import Sketch
from weightsmith.merging.repair import LowRankUpdate, Repairs
from weightsmith.merging.rounding import F64, round_once
from weightsmith.merging.stream import ARRAY_TYPES, OpenFiles

BLOCK = 1 << 20
"""Elements per block on the CPU; larger blocks reduce the overhead of repairs and queues."""
_LEAST_ROWS = 16
"""Rows for which there is always room: products of fewer rows take twice as long per row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How blocks are computed; does not affect the bytes."""

    device: str
    """`cpu`, or `cuda` for blocks that torch computes on a GPU."""
    workers: int
    block: int = BLOCK
    piece: int = PIECE


@dataclass(slots=True)
class MergeCounts:
    """What becomes findings; the journal keeps it for a merge that resumes."""

    repairs: Repairs = field(default_factory=Repairs)
    silent: dict[int, list[str]] = field(default_factory=dict)
    """Adapter index -> tensors for which a factor is all zero."""
    unchanged: tuple[str, ...] = ()
    """Changed tensors whose result equals the base's bits."""
    largest: dict[str, float] = field(default_factory=dict)
    """Computed matrices -> their largest magnitude, if no weights are written."""

    def about(self, names: Iterable[str], repairs: Repairs) -> dict[str, JsonValue]:
        """Return the counts of these tensors as JSON; `repairs` are theirs."""
        own = set(names)
        # Copied because the next shard is being computed concurrently.
        silent = list(self.silent.items())
        return {
            "silent": {
                str(number): [name for name in some if name in own] for number, some in silent
            },
            "unchanged": [name for name in self.unchanged if name in own],
            "repairs": [repairs.float64, repairs.exact],
            "largest": {name: most for name, most in self.largest.items() if name in own},
        }

    def add(self, part: Mapping[str, Json]) -> None:
        """Add counts returned by `about`."""
        for number, names in part["silent"].items():
            if names:
                self.silent.setdefault(int(number), []).extend(names)
        self.unchanged += tuple(part["unchanged"])
        self.largest |= part["largest"]
        self.repairs.float64 += part["repairs"][0]
        self.repairs.exact += part["repairs"][1]


def stored_copy(output: MergedTensor) -> StoredTensor | None:
    """Return the stored tensor whose bytes an output has, or None if its rows are computed."""
    # Tensors from adapters are checked for NaN, if their dtype can have it.
    unchecked = output.kind == "copied" or output.dtype not in ARRAY_TYPES
    source = output.source
    return source if output.as_is and unchecked and isinstance(source, StoredTensor) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Rows of a tensor that are computed alike."""

    first: int
    count: int
    rows: Rows
    """(first row of the tensor, count) -> merged rows in the output's dtype."""
    step: int
    """Rows per block."""
    fixed: bool
    """Whether the bits may depend on the block: only whole blocks may be computed."""

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Yield the first row and count of each block."""
        for first in range(self.first, self.first + self.count, self.step):
            yield first, min(self.step, self.first + self.count - first)


class RowMaker:
    """Computes merged rows of one plan; thread-safe."""

    def __init__(self, settings: Settings, tally: MergeCounts) -> None:
        self._settings, self._tally = settings, tally
        self.files = OpenFiles()
        self._local, self._lock = threading.local(), threading.Lock()
        self._on_device: tuple[PreparedAddition, Any] | None = None

    def spans(self, output: MergedTensor, sketch: Sketch | None = None) -> Iterator[Span]:
        """Yield a tensor's spans in order; each reads its factors when it is yielded.

        `sketch` takes the base's rows as they are merged.
        """
        if not output.size:
            return
        if output.change is not None:
            rows = output.change.begin(output, self.files)
            # Fixed blocks: float64 sums may depend on the number of rows computed at once.
            step = output.rows if output.change.whole else max(1, BLOCK // output.columns)
            computed = partial(self._computed, output, rows)
            yield Span(first=0, count=output.rows, rows=computed, step=step, fixed=True)
            return
        step = max(1, self._settings.block // output.columns)
        for band in bands(output):
            addition = self._prepare(output, band)
            make = partial(self._unchanged, output, sketch)
            if addition is not None:
                make = partial(self._merge, output, sketch, addition, band.first)
            size = band.end - band.first
            yield Span(first=band.first, count=size, rows=make, step=step, fixed=False)

    def _prepare(self, output: MergedTensor, band: Band) -> PreparedAddition | None:
        """Read the factors of one band; None if they are all zero."""
        lefts, rights, gains = [], [], []
        for term in band.terms:
            start = band.first - term.first
            left = self.files.matrix(term.left)[start : start + band.end - band.first]
            right = self.files.matrix(term.right)
            if not left.any() or not right.any():
                silent = self._tally.silent.setdefault(term.adapter, [])
                if output.name not in silent:
                    silent.append(output.name)
                continue
            lefts.append(left)
            rights.append(right)
            gains += [term.factor] * term.rank
        if not lefts:
            return None
        # Transposed parts are in Fortran's order, and numpy keeps it when it joins them.
        factors = LowRankUpdate(
            left=np.ascontiguousarray(lefts[0] if len(lefts) == 1 else np.concatenate(lefts, 1)),
            right=np.ascontiguousarray(rights[0] if len(rights) == 1 else np.concatenate(rights)),
            gains=np.array(gains, F64),
        )
        return prepare(output.name, factors, ARRAY_TYPES[output.dtype])

    def _merge(
        self,
        output: MergedTensor,
        sketch: Sketch | None,
        addition: PreparedAddition,
        offset: int,
        first: int,
        count: int,
    ) -> np.ndarray:
        weight = output.source.rows(self.files, first, count, output.columns)
        out = np.empty(weight.shape, addition.dtype)
        if self._settings.device == "cpu":
            space = self._space(addition.dtype, addition.work, weight.shape[1])
            done = merge_rows(addition, weight, first - offset, space, out)
        else:
            from weightsmith.merging import torch_kernel

            with self._lock:
                if self._on_device is None or self._on_device[0] is not addition:
                    held = torch_kernel.to_device(addition, self._settings.device)
                    self._on_device = (addition, held)
                held = self._on_device[1]
            flagged, safe = torch_kernel.first_pass(held, weight, first - offset, out)
            done = finish_rows(addition, weight, first - offset, out, flagged, safe)
        if sketch is not None:
            sketch.add(first, weight, out)
        with self._lock:
            self._tally.repairs.float64 += done.float64
            self._tally.repairs.exact += done.exact
        return out

    def _space(self, dtype: np.dtype, work: np.dtype, columns: int) -> Space:
        """Return this worker's buffers; replace them only if too small or of another dtype."""
        key = (dtype, work)
        held: tuple[Any, int, Space] | None = getattr(self._local, "space", None)
        least = _LEAST_ROWS * columns
        if held is None or held[0] != key or held[1] < least:
            size = max(least, self._settings.piece)
            held = (key, size, Space(size, *key))
            self._local.space = held
        return held[2]

    def _unchanged(
        self, output: MergedTensor, sketch: Sketch | None, first: int, count: int
    ) -> np.ndarray:
        """Return rows without terms: patched and cast, with one rounding."""
        base = output.source.rows(self.files, first, count, output.columns)
        weight = patched(output.patches, self.files, base, first)
        if output.kind != "copied" and not is_finite(weight).all():
            raise InputRefused(
                f"the adapter's {output.name} has NaN or infinite values",
                hint="the training diverged or a file is damaged; use an earlier checkpoint",
            )
        out = self._rounded(output, weight)
        if sketch is not None:
            sketch.add(first, base, out)
        return out

    def _computed(self, output: MergedTensor, rows: Rows, first: int, count: int) -> np.ndarray:
        values = rows(first, count)
        if not np.isfinite(values).all():
            raise InputRefused(
                f"the merged {output.name} has NaN or infinite values",
                hint="the base or the adapter is damaged, or a weight is far too large",
            )
        return self._rounded(output, values)

    def _rounded(self, output: MergedTensor, values: np.ndarray) -> np.ndarray:
        dtype = ARRAY_TYPES[output.dtype]
        out = values if values.dtype == dtype else round_once(values, dtype)
        if not np.array_equal(is_finite(out), is_finite(values)):
            raise InputRefused(
                f"{output.name} overflows {dtype.name}: its largest value is "
                f"{float(np.abs(as_float(values, F64)).max()):g}",
                hint="merge with dtype bfloat16 or float32",
            )
        return out


def patched(
    patches: tuple[Patch, ...], files: OpenFiles, weight: np.ndarray, first: int
) -> np.ndarray:
    """Return the rows from `first` on with patches applied; float64 if there are any."""
    columns = weight.shape[1]
    for patch in patches:
        for row, place in enumerate(patch.places):
            if first <= place < first + len(weight):
                weight = as_float(weight, F64)
                weight[place - first] = as_float(patch.stored.rows(files, row, 1, columns)[0], F64)
    return weight
