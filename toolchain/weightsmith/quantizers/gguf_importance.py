"""Importance of each column, as llama-quantize reads it from a file."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np

from weightsmith.core.errors import InputRefused
from weightsmith.quantizers.gguf_header import GgufTensorInfo, number, read_header, strings

DIGEST_KEY = "weightsmith.imatrix.digest"
"""GGUF key of the sha256 of the importance matrix."""
_DATASETS, _CHUNKS = "imatrix.datasets", "imatrix.chunk_count"
_HINT = "set imatrix to auto, or to a file that llama-imatrix made from this model"
_LONGEST_TEXT = 127
"""llama-quantize cuts texts of its own keys."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Importance:
    """The values of a file, and what is written about it."""

    values: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Tensor -> float32 [matrices, columns]."""
    about: Mapping[str, str | int] = field(default_factory=dict)
    """Keys of the quantized file."""

    def of(self, name: str, columns: int, matrices: int) -> np.ndarray | None:
        """Return a tensor's values [matrices, columns], or None.

        Raises InputRefused if their number differs. Embeddings may differ: llama-quantize
        quantizes them without.
        """
        found = self.values.get(name)
        if found is None or found.size == columns * matrices:
            return None if found is None else found.reshape(matrices, columns)
        if name in ("token_embd.weight", "per_layer_token_embd.weight"):
            return None
        raise InputRefused(
            f"the importance matrix has {found.size} values for {name}, not {columns * matrices}",
            hint=_HINT,
        )


def read_importance(path: Path) -> Importance:
    """Return a file's importance; raises InputRefused for NaN and infinity."""
    with path.open("rb") as file:
        is_gguf = file.read(4) == b"GGUF"
    values, datasets, chunks = _of_gguf(path) if is_gguf else _of_dat(path)
    for name, found in values.items():
        if not np.isfinite(found).all():
            raise InputRefused(f"the importance matrix has NaN or infinity for {name}", hint=_HINT)
    about: dict[str, str | int] = {"quantize.imatrix.file": path.name[:_LONGEST_TEXT]}
    if datasets:
        about["quantize.imatrix.dataset"] = datasets[0][:_LONGEST_TEXT]
    about["quantize.imatrix.entries_count"] = len(values)
    if chunks > 0:
        about["quantize.imatrix.chunks_count"] = chunks
    return Importance(values=values, about=about)


def _of_gguf(path: Path) -> tuple[dict[str, np.ndarray], list[str], int]:
    header = read_header(path)
    entries = header.tensors
    values = {}
    with np.errstate(divide="ignore", invalid="ignore"), path.open("rb") as file:
        for name in [name for name in entries if name.endswith(".in_sum2")]:
            plain = name.removesuffix(".in_sum2")
            sums = _floats(file, entries[name], header.size)
            # Rounded as lround does: halves away from zero.
            counts = np.floor(_floats(file, entries[f"{plain}.counts"], header.size) + 0.5)
            each = sums.reshape(counts.size, -1)
            values[plain] = np.where(
                counts[:, None] > 0, each / counts[:, None].astype(np.float32), np.float32(1)
            )
    datasets = strings(header.values[_DATASETS]) if _DATASETS in header.values else []
    chunks = number(header.values[_CHUNKS]) if _CHUNKS in header.values else 0
    return values, datasets, chunks


def _floats(file: IO[bytes], entry: GgufTensorInfo, start: int) -> np.ndarray:
    file.seek(start + entry.offset)
    return np.frombuffer(file.read(4 * entry.rows * entry.columns), np.float32)


def _of_dat(path: Path) -> tuple[dict[str, np.ndarray], list[str], int]:
    """Read llama.cpp's older format: entries, then perhaps chunks and the dataset's name."""
    with path.open("rb") as file:
        values = dict(_entries(file))
        rest = file.read()
    chunks = struct.unpack_from("<i", rest)[0] if len(rest) >= 4 else 0
    length = struct.unpack_from("<i", rest, 4)[0] if len(rest) >= 8 else 0
    name = rest[8 : 8 + length].split(b"\0")[0].decode("utf-8") if length > 0 else ""
    return values, [name] if name else [], chunks


def _entries(file: IO[bytes]) -> Iterator[tuple[str, np.ndarray]]:
    (count,) = struct.unpack("<i", file.read(4))
    for _ in range(count):
        (length,) = struct.unpack("<i", file.read(4))
        name = file.read(length).decode("utf-8")
        calls, columns = struct.unpack("<ii", file.read(8))
        found = np.frombuffer(file.read(4 * columns), np.float32)
        yield name, found / np.float32(calls) if calls > 0 else found
