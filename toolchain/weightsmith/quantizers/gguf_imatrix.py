"""Importance matrices of llama.cpp: checks against a model, and experts without data."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from weightsmith.core.errors import InputRefused
from weightsmith.models.facts import ModelFacts

_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.weight")
_READS_HIDDEN = frozenset({"attn_q", "attn_k", "attn_v", "attn_qkv", "ffn_up", "ffn_gate"})
_MAGIC = b"GGUF"
_LONGEST_NAME = 4096
_HINT = "create it with `imatrix: auto`, or with llama-imatrix from this model"


@dataclass(frozen=True, slots=True, kw_only=True)
class ImatrixEntry:
    """One tensor's entry: number of inputs, and how often each of its matrices was used."""

    name: str
    columns: int
    counts: tuple[float, ...]


def check_imatrix(path: Path, model: ModelFacts) -> None:
    """Raise InputRefused unless a file is an importance matrix that matches a config.json.

    Layer count and widths are compared; models of the same shape cannot be distinguished.
    """
    entries = read_imatrix(path)
    blocks = {int(m[1]) + 1 for e in entries if (m := _BLOCK.fullmatch(e.name))}
    if not blocks:
        raise _wrong_model(path, "it has no entries for decoder layers")
    if model.layers not in (0, max(blocks)):
        raise _wrong_model(path, f"it has {max(blocks)} layers, but the model has {model.layers}")
    for entry in entries:
        part = _BLOCK.fullmatch(entry.name)
        if part and part[2] in _READS_HIDDEN and model.hidden not in (0, entry.columns):
            raise _wrong_model(
                path, f"{entry.name} has {entry.columns} columns, not {model.hidden}"
            )


def experts_missed(path: Path) -> list[str]:
    """Return a warning if calibration did not reach some experts."""
    missed = {
        f"layer {part[1]}" if (part := _BLOCK.fullmatch(entry.name)) else entry.name: sum(
            count == 0 for count in entry.counts
        )
        for entry in read_imatrix(path)
        if len(entry.counts) > 1 and 0 in entry.counts
    }
    if not missed:
        return []
    where = ", ".join(f"{name}: {count}" for name, count in list(missed.items())[:8])
    more = ", …" if len(missed) > 8 else ""
    text = (
        f"calibration did not reach {sum(missed.values())} experts ({where}{more}): their "
        "weights are quantized without importance; add more varied calibration text"
    )
    return [text]


def read_imatrix(path: Path) -> list[ImatrixEntry]:
    """Return the entries of a GGUF or `.dat` importance matrix; raises InputRefused."""
    try:
        with path.open("rb") as stream:
            if stream.read(4) == _MAGIC:
                return _of_gguf(path)
            stream.seek(0)
            return list(_of_dat(stream, path.stat().st_size))
    except OSError as error:
        raise InputRefused(
            f"cannot read {path}: {error.strerror}", hint="give an importance matrix file"
        ) from None
    except (ValueError, IndexError, KeyError, TypeError, struct.error, OverflowError) as error:
        raise InputRefused(f"{path} is not an importance matrix: {error}", hint=_HINT) from None


def _of_gguf(path: Path) -> list[ImatrixEntry]:
    # Imported here to keep listing the formats fast.
    from weightsmith.models.gguf_reader import GGUFReader

    reader = GGUFReader(path)
    kind = reader.fields.get("general.type")
    if kind is None or kind.contents() != "imatrix":
        raise ValueError("its general.type is not imatrix")
    tensors: dict[str, Any] = {tensor.name: tensor for tensor in reader.tensors}
    return [
        ImatrixEntry(
            name=name.removesuffix(".in_sum2"),
            columns=int(tensor.shape[0]),
            counts=tuple(float(c) for c in tensors[_counts(name)].data.ravel()),
        )
        for name, tensor in tensors.items()
        if name.endswith(".in_sum2")
    ]


def _counts(name: str) -> str:
    return name.removesuffix(".in_sum2") + ".counts"


def _of_dat(stream: IO[bytes], size: int) -> Iterator[ImatrixEntry]:
    """Read llama.cpp's `--output-format dat`, which has no counts per expert."""
    (number,) = struct.unpack("<i", stream.read(4))
    if number < 1:
        raise ValueError(f"it has {number} entries")
    for _ in range(number):
        (length,) = struct.unpack("<i", stream.read(4))
        if not 0 < length <= _LONGEST_NAME:
            raise ValueError(f"invalid name length {length}")
        name = stream.read(length).decode("utf-8")
        calls, columns = struct.unpack("<ii", stream.read(8))
        if not 0 < 4 * columns <= size - stream.tell():
            raise ValueError(f"{name} has an invalid size")
        stream.seek(4 * columns, 1)
        yield ImatrixEntry(name=name, columns=columns, counts=(float(calls),))


def _wrong_model(path: Path, why: str) -> InputRefused:
    return InputRefused(f"{path} does not match the model: {why}", hint=_HINT)
