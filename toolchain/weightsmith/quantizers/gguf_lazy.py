"""Tensors of llama.cpp's converter, which computes them when they are written.

By the functions of the pinned gguf-py/gguf/lazy.py, quants.py and conversion/base.py. What is not
recognized is computed as a whole by the converter itself, so a changed converter costs memory, not
correctness.
"""

from __future__ import annotations

import math
from tempfile import TemporaryFile
from typing import Any

import numpy as np

from weightsmith.quantizers.gguf_rows import STORED, Place, Read, as_float32, joined, to_bfloat16


def rows_of(tensor: Any, kind: str, columns: int) -> Read:
    """Return the rows of a tensor that the converter would write in type `kind`.

    A weight that it passes on unchanged is read from the checkpoint a few rows at a time, as are
    stacked experts; every other tensor is computed as a whole.
    """
    if places := _places(tensor, kind, columns):
        return joined(places)
    if kind == "BF16" and _step(tensor) == "quantize":
        # Rounded where it is read: several times as fast as by gguf-py.
        exact = _eager(_argument(tensor)).astype(np.float32, copy=False).reshape(-1, columns)
        return lambda start, end: to_bfloat16(exact[start:end])
    whole = computed(tensor).view(STORED[kind]).reshape(-1, columns)
    return lambda start, end: as_float32(kind, whole[start:end])


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


def _places(node: Any, kind: str, columns: int) -> list[Place]:
    """Return where a tensor's weights lie; empty if anything but their type changes."""
    while (step := _step(node)) in ("to float32", "numpy", "astype", "quantize"):
        node = _argument(node)
    if step == "stack":
        inner = [_places(one, kind, columns) for one in _argument(node)]
        return [found[0] for found in inner] if all(len(found) == 1 for found in inner) else []
    if step != "load":
        return []
    local = _argument(node)
    if local.dtype not in STORED or kind not in ("F32", local.dtype):
        return []  # rounded on the way
    span, rows = local.data_range, math.prod(local.shape) // columns
    place = {"path": span.filename, "offset": span.offset, "rows": rows, "columns": columns}
    return [Place(kind=local.dtype, **place)]


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
    return ""


def _argument(node: Any) -> Any:
    return vars(node)["_args"][0]


def _method(func: Any) -> str:
    """Return the method that a lambda of gguf-py's LazyMeta calls."""
    cells = dict(zip(func.__code__.co_freevars, func.__closure__ or (), strict=True))
    return str(cells["name"].cell_contents) if "name" in cells else ""
