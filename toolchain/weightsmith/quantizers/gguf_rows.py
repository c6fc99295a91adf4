"""Rows of a tensor as float32, computed when they are read.

llama.cpp's converter computes tensors when they are written. They are read here by the functions of
the pinned gguf-py/gguf/lazy.py, quants.py and conversion/base.py. What is not recognized is
computed as a whole by the converter itself, so a changed converter costs memory, not correctness.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, TypeAlias

import numpy as np

from weightsmith.core.kernels import quants
from weightsmith.models import tensors

Read = Callable[[int, int], np.ndarray]
"""(first row, end) -> float32 [rows, columns], C-contiguous."""
STORED: dict[str, np.dtype[np.generic]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}
"""Array type of each float type; bfloat16 as bits."""
_MOVES = ("reshape", "swapaxes")
"""Steps by which the converter moves rows: llama.cpp rotates other pairs of a head's rows."""
_NEAR = 1 << 20
"""Weights between a row's places: as many as a block of the pass."""
_Move: TypeAlias = tuple[str, list[Any]]
"""A step that moves rows, and its arguments."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredRows:
    """Rows that lie in a file, or would if it had data."""

    path: Path
    kind: str
    """F32, F16 or BF16."""
    offset: int
    rows: int
    columns: int
    order: np.ndarray | None = field(default=None, compare=False)
    """Where each row lies in the file, if not one after the other: int64 [rows]."""

    def read(self, start: int, end: int) -> np.ndarray:
        """Return rows as float32; raises ValueError at the file's end.

        Rows that lie between those of another order are read, too.
        """
        if self.order is None:
            return self._stored(start, end)
        picked = self.order[start:end]
        first = int(picked.min())
        rows: np.ndarray = self._stored(first, int(picked.max()) + 1)[picked - first]
        return rows

    def _stored(self, start: int, end: int) -> np.ndarray:
        dtype, count = STORED[self.kind], (end - start) * self.columns
        at = self.offset + start * self.columns * dtype.itemsize
        if virtual := tensors.computed(self.path):
            data = virtual.read(at, count * dtype.itemsize).view(dtype)
        else:
            data = np.fromfile(self.path, dtype, count, offset=at)
        if len(data) != count:
            raise ValueError(f"{self.path.name} ends inside a tensor")
        return quants.widen(self.kind, data).reshape(-1, self.columns)


def joined(places: Sequence[StoredRows]) -> Read:
    """Return the rows of matrices of equal height, one after the other."""
    height = places[0].rows

    def read(start: int, end: int) -> np.ndarray:
        spans = [
            places[at].read(max(start - at * height, 0), min(end - at * height, height))
            for at in range(start // height, -(-end // height))
        ]
        return spans[0] if len(spans) == 1 else np.concatenate(spans)

    return read


def to_bfloat16(rows: np.ndarray) -> np.ndarray:
    """Return float32 rounded to bfloat16, halves to even, as float32; NaN stays NaN."""
    bits = rows.view(np.uint32)
    even = bits + (((bits >> np.uint32(16)) & np.uint32(1)) + np.uint32(0x7FFF))
    even &= np.uint32(0xFFFF0000)
    return np.where(np.isnan(rows), rows, even.view(np.float32))


def rows_of(tensor: object, kind: str, columns: int) -> Read:
    """Return the rows of a tensor that the converter would write in type `kind`.

    A weight that it passes on unchanged is read from the checkpoint a few rows at a time, as are
    stacked experts and weights whose heads' rows change places; every other tensor is computed as
    a whole.
    """
    if places := _places(tensor, kind, columns):
        return joined(places)
    if kind == "BF16" and _step(tensor) == "quantize":
        # Rounded where it is read: several times as fast as by gguf-py.
        exact = _eager(vars(tensor)["_args"][0]).astype(np.float32, copy=False).reshape(-1, columns)
        return lambda start, end: to_bfloat16(exact[start:end])
    whole = computed(tensor).view(STORED[kind]).reshape(-1, columns)
    return lambda start, end: quants.widen(kind, whole[start:end])


def is_stored(tensor: object, kind: str, columns: int) -> bool:
    """Return whether a tensor's weights lie in the checkpoint, and type `kind` has their values."""
    return bool(_places(tensor, kind, columns))


def place_of(tensor: object) -> tuple[str, int]:
    """Return file and offset of the first data that a tensor is made of; empty for none."""
    left: list[object] = [tensor]
    found, known = list[tuple[str, int]](), set[int]()
    while left:
        node = left.pop()
        if isinstance(node, list | tuple):
            left += node
        elif id(node) not in known and hasattr(node, "__dict__"):
            known.add(id(node))
            if _step(node) == "load":
                span = vars(node)["_args"][0].data_range
                found.append((str(span.filename), int(span.offset)))
            else:
                left += [vars(node).get("_args", ()), *vars(node).get("_kwargs", {}).values()]
    return min(found, default=("", 0))


def computed(tensor: object) -> np.ndarray:
    """Return the bytes that the converter would write of a tensor: uint8 [size]."""
    if isinstance(tensor, np.ndarray):
        return np.ascontiguousarray(tensor).reshape(-1).view(np.uint8)
    if "_func" in vars(tensor):
        return computed(_eager(tensor))
    parts: Any = tensor
    with TemporaryFile() as file:  # each is computed when it is written
        parts.tofile(file)
        file.flush()
        return np.memmap(file, np.uint8, "r")


def _eager(tensor: object) -> np.ndarray:
    kind: Any = type(tensor)
    return np.ascontiguousarray(kind.to_eager(tensor))


def _places(node: object, kind: str, columns: int) -> list[StoredRows]:
    """Return where a tensor's weights lie; empty if anything but type and order of rows changes."""
    moves: list[_Move] = []
    while (step := _step(node)) in ("to float32", "numpy", "astype", "quantize", *_MOVES):
        if step in _MOVES:
            moves.insert(0, (step, list(vars(node)["_args"][1:])))
        node = vars(node)["_args"][0]
    if step == "stack":
        inner = [] if moves else [_places(one, kind, columns) for one in vars(node)["_args"][0]]
        return [found[0] for found in inner] if all(len(found) == 1 for found in inner) else []
    if step != "load":
        return []
    local = vars(node)["_args"][0]
    if local.dtype not in STORED or kind not in ("F32", local.dtype):
        return []  # rounded on the way
    span, rows, order = local.data_range, math.prod(local.shape) // columns, None
    if moves and (order := _order(moves, rows, columns)) is None:
        return []
    place = {"path": span.filename, "offset": span.offset, "rows": rows, "columns": columns}
    return [StoredRows(kind=local.dtype, order=order, **place)]


def _order(moves: Sequence[_Move], rows: int, columns: int) -> np.ndarray | None:
    """Return where each row was before it was moved: int64 [rows].

    None if more than whole rows moved, or one so far that a block would need many others.
    """
    order = np.arange(rows)
    for step, given in moves:
        sizes = list(given[0]) if isinstance(given[0], list | tuple) else given
        if step == "reshape" and sizes[-1] == columns and min(sizes) > 0:
            order = order.reshape(sizes[:-1])
        elif step == "swapaxes" and 0 <= min(sizes) <= max(sizes) < order.ndim:
            order = order.swapaxes(*sizes)
        else:
            return None
    order = order.reshape(-1)
    return order if np.abs(order - np.arange(rows)).max() * columns <= _NEAR else None


def _step(node: object) -> str:
    """Return the name of a tensor's last operation; empty if it is none of these, or was done."""
    fields = vars(node) if hasattr(node, "__dict__") else {}
    func = fields.get("_func")
    if func is None or fields["_data"] is not None:
        return ""
    arguments, words = [str(a) for a in fields["_args"][1:]], fields["_kwargs"]
    inside, name = func.__qualname__.split(".<locals>")[0], func.__name__
    if inside == "LazyMeta.__new__":  # a lambda that calls a method of the tensor
        cells = dict(zip(func.__code__.co_freevars, func.__closure__ or (), strict=True))
        name = str(cells["name"].cell_contents) if "name" in cells else ""
        if name == "to":
            return "to float32" if arguments == ["torch.float32"] and not words else ""
        return name if name in _MOVES and not words else ""
    match inside, name:
        case "LazyTorchTensor.from_local_tensor", _:
            return "load"
        case ("LazyTorchTensor.numpy", _) | ("LazyNumpyTensor.astype", _):
            return str(inside).partition(".")[2]
        case _, "__quantize_array":
            return "quantize"
        case _, "stack" if not arguments and words in ({}, {"dim": 0}):
            return "stack"
    return ""
