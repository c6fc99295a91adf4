"""Tensors of llama.cpp's converter, which computes them when they are written.

By the functions of the pinned gguf-py/gguf/lazy.py, quants.py and conversion/base.py. What is not
recognized is computed as a whole by the converter itself, so a changed converter costs memory, not
correctness.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from tempfile import TemporaryFile
from typing import Any

import numpy as np

from weightsmith.core.kernels import quants
from weightsmith.quantizers.gguf_rows import STORED, Read, StoredRows, joined, to_bfloat16

_MOVES = ("reshape", "swapaxes")
"""Steps by which the converter moves rows: llama.cpp rotates other pairs of a head's rows."""
_NEAR = 1 << 20
"""Weights between a row's places: as many as a block of the pass."""


def rows_of(tensor: Any, kind: str, columns: int) -> Read:
    """Return the rows of a tensor that the converter would write in type `kind`.

    A weight that it passes on unchanged is read from the checkpoint a few rows at a time, as are
    stacked experts and weights whose heads' rows change places; every other tensor is computed as
    a whole.
    """
    if places := _places(tensor, kind, columns):
        return joined(places)
    if kind == "BF16" and _step(tensor) == "quantize":
        # Rounded where it is read: several times as fast as by gguf-py.
        exact = _eager(_argument(tensor)).astype(np.float32, copy=False).reshape(-1, columns)
        return lambda start, end: to_bfloat16(exact[start:end])
    whole = computed(tensor).view(STORED[kind]).reshape(-1, columns)
    return lambda start, end: quants.widen(kind, whole[start:end])


def is_stored(tensor: Any, kind: str, columns: int) -> bool:
    """Return whether a tensor's weights lie in the checkpoint, and type `kind` has their values."""
    return bool(_places(tensor, kind, columns))


def place_of(tensor: Any) -> tuple[str, int]:
    """Return file and offset of the first data that a tensor is made of; empty for none."""
    found, left, known = [], [tensor], set[int]()
    while left:
        node = left.pop()
        if isinstance(node, list | tuple):
            left += node
        elif id(node) not in known and hasattr(node, "__dict__"):
            known.add(id(node))
            if _step(node) == "load":
                span = _argument(node).data_range
                found.append((str(span.filename), int(span.offset)))
            else:
                left += [vars(node).get("_args", ()), *vars(node).get("_kwargs", {}).values()]
    return min(found, default=("", 0))


def computed(tensor: Any) -> np.ndarray:
    """Return the bytes that the converter would write of a tensor: uint8 [size]."""
    if isinstance(tensor, np.ndarray):
        return np.ascontiguousarray(tensor).reshape(-1).view(np.uint8)
    if "_func" in vars(tensor):
        return computed(_eager(tensor))
    with TemporaryFile() as file:  # a tensor in parts, each computed when it is written
        tensor.tofile(file)
        file.flush()
        return np.memmap(file, np.uint8, "r")


def _eager(tensor: Any) -> np.ndarray:
    return np.ascontiguousarray(type(tensor).to_eager(tensor))


def _places(node: Any, kind: str, columns: int) -> list[StoredRows]:
    """Return where a tensor's weights lie; empty if anything but type and order of rows changes."""
    moves: list[tuple[str, list[Any]]] = []
    while (step := _step(node)) in ("to float32", "numpy", "astype", "quantize", *_MOVES):
        if step in _MOVES:
            moves.insert(0, (step, list(vars(node)["_args"][1:])))
        node = _argument(node)
    if step == "stack":
        inner = [] if moves else [_places(one, kind, columns) for one in _argument(node)]
        return [found[0] for found in inner] if all(len(found) == 1 for found in inner) else []
    if step != "load":
        return []
    local = _argument(node)
    if local.dtype not in STORED or kind not in ("F32", local.dtype):
        return []  # rounded on the way
    span, rows, order = local.data_range, math.prod(local.shape) // columns, None
    if moves and (order := _order(moves, rows, columns)) is None:
        return []
    place = {"path": span.filename, "offset": span.offset, "rows": rows, "columns": columns}
    return [StoredRows(kind=local.dtype, order=order, **place)]


def _order(moves: Sequence[tuple[str, list[Any]]], rows: int, columns: int) -> np.ndarray | None:
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


def _step(node: Any) -> str:
    """Return the name of a tensor's last operation; empty if it is none of these, or was done."""
    fields = vars(node) if hasattr(node, "__dict__") else {}
    func = fields.get("_func")
    if func is None or fields["_data"] is not None:
        return ""
    arguments, words = [str(a) for a in fields["_args"][1:]], fields["_kwargs"]
    inside, name = func.__qualname__.split(".<locals>")[0], func.__name__
    match inside, name:
        case "LazyTorchTensor.from_local_tensor", _:
            return "load"
        case "LazyTorchTensor.numpy", _:
            return "numpy"
        case "LazyNumpyTensor.astype", _:
            return "astype"
        case _, "__quantize_array":
            return "quantize"
        case _, "stack" if not arguments and words in ({}, {"dim": 0}):
            return "stack"
        case "LazyMeta.__new__", _ if _method(func) == "to":
            return "to float32" if arguments == ["torch.float32"] and not words else ""
        case "LazyMeta.__new__", _ if (move := _method(func)) in _MOVES and not words:
            return move
    return ""


def _argument(node: Any) -> Any:
    return vars(node)["_args"][0]


def _method(func: Any) -> str:
    """Return the method that a lambda of gguf-py's LazyMeta calls."""
    cells = dict(zip(func.__code__.co_freevars, func.__closure__ or (), strict=True))
    return str(cells["name"].cell_contents) if "name" in cells else ""
