"""Importance of each column: what it is measured on and by what, and matrices read from files.

Our walk is the default from 200 MB on; below that its imports take longer than llama-imatrix.
llama-imatrix runs with one CPU variant (x86-64-v3), because another order of sums changes the file:
17 instead of 8 CPU seconds for 3,600 tokens of the support bot.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np

from weightsmith.core.cpus import has_avx2
from weightsmith.core.errors import InputRefused
from weightsmith.core.safe_parse import parse_file
from weightsmith.models.facts import ModelFacts
from weightsmith.quantizers.architectures import MEASURED
from weightsmith.quantizers.gguf_header import GgufTensorInfo, number, read_header, strings

IMATRIX_WORDS = frozenset({"", "auto", "walk", "off"})
"""Values of the option `imatrix` that are no file's name."""
WITHOUT_WALK = frozenset({"DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM"})
"""The converter splits `kv_b_proj` into two matrices, which have other inputs than it."""
WALK_TOKENS = 1 << 16
"""Our walk runs so many through all layers before the next: their states are in memory."""
DIGEST_KEY = "weightsmith.imatrix.digest"
"""GGUF key of the sha256 of the importance matrix."""

_WALK_BYTES = 200_000_000
"""Of a checkpoint: below, the walk's imports take longer than llama-imatrix."""
_WINDOW = 512
"""llama-imatrix's default."""
_MIN_TOKENS = 256
_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.weight")
_READS_HIDDEN = frozenset({"attn_q", "attn_k", "attn_v", "attn_qkv", "ffn_up", "ffn_gate"})
_LONGEST_NAME = 4096
_LONGEST_TEXT = 127
"""llama-quantize cuts texts of its own keys."""
_DATASETS, _CHUNKS = "imatrix.datasets", "imatrix.chunk_count"
_HINT = "set imatrix to auto, or to a file that llama-imatrix made from this model"
_MAKE = "create it with `imatrix: auto`, or with llama-imatrix from this model"


def window_of(model: Path, texts: int, tokens: int) -> int:
    """Return how many tokens of the joined texts run together.

    `texts` is their number, for the message. Raises InputRefused for too few tokens.
    """
    if tokens < _MIN_TOKENS:
        raise InputRefused(
            f"the {texts} calibration texts have {tokens} tokens; an importance matrix needs "
            f"at least {_MIN_TOKENS}",
            hint="add calibration text, or set imatrix to off",
        )
    context = int(str(config_of(model).get("max_position_embeddings") or _WINDOW))
    return min(_WINDOW, context, 1 << (tokens.bit_length() - 2))


def check_walk(model: ModelFacts) -> None:
    """Refuse an architecture whose layers our walk cannot run, or whose inputs it does not know."""
    if model.architecture not in MEASURED - WITHOUT_WALK:
        raise InputRefused(
            f"imatrix: walk does not support {model.architecture}",
            hint="set imatrix to auto, which lets llama-imatrix measure",
        )


def measured_by(model: ModelFacts, size: int) -> str:
    """Return who measures importance if nobody was named: `walk`, or `auto` for llama-imatrix.

    `size` is the checkpoint's in bytes. Without AVX2, the bits of a walk are this CPU's own.
    """
    known = model.architecture in MEASURED - WITHOUT_WALK
    return "walk" if known and size >= _WALK_BYTES and has_avx2() else "auto"


def config_of(model: Path) -> dict[str, object]:
    """Return a model's config.json, with that of its language model; {} if it cannot be read."""
    try:
        config = parse_file(model / "config.json")
    except (OSError, ValueError):
        return {}
    return {**config, **(config.get("text_config") or {})}


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
    entries, why = read_imatrix(path), ""
    blocks = {int(m[1]) + 1 for e in entries if (m := _BLOCK.fullmatch(e.name))}
    if not blocks:
        why = "it has no entries for decoder layers"
    elif model.layers not in (0, max(blocks)):
        why = f"it has {max(blocks)} layers, but the model has {model.layers}"
    for entry in () if why else entries:
        part = _BLOCK.fullmatch(entry.name)
        if part and part[2] in _READS_HIDDEN and model.hidden not in (0, entry.columns):
            why = f"{entry.name} has {entry.columns} columns, not {model.hidden}"
            break
    if why:
        raise InputRefused(f"{path} does not match the model: {why}", hint=_MAKE)


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
    # Imported here to keep listing the formats fast.
    from weightsmith.models.gguf_reader import GGUFReader

    try:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                file.seek(0)
                return [
                    ImatrixEntry(name=name, columns=len(values), counts=(float(calls),))
                    for name, calls, values in _dat_entries(file, path.stat().st_size)
                ]
        reader = GGUFReader(path)
        kind = reader.fields.get("general.type")
        if kind is None or kind.contents() != "imatrix":
            raise ValueError("its general.type is not imatrix")
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        return [
            ImatrixEntry(
                name=(plain := name.removesuffix(".in_sum2")),
                columns=int(tensor.shape[0]),
                counts=tuple(map(float, tensors[f"{plain}.counts"].data.ravel())),
            )
            for name, tensor in tensors.items()
            if name.endswith(".in_sum2")
        ]
    except OSError as error:
        raise InputRefused(
            f"cannot read {path}: {error.strerror}", hint="give an importance matrix file"
        ) from None
    except (ValueError, IndexError, KeyError, TypeError, struct.error, OverflowError) as error:
        raise InputRefused(f"{path} is not an importance matrix: {error}", hint=_MAKE) from None


def _dat_entries(file: IO[bytes], size: int) -> Iterator[tuple[str, int, np.ndarray]]:
    """Yield name, calls and sums of llama.cpp's older format, which has no counts per expert."""
    (count,) = struct.unpack("<i", file.read(4))
    if count < 1:
        raise ValueError(f"it has {count} entries")
    for _ in range(count):
        (length,) = struct.unpack("<i", file.read(4))
        if not 0 < length <= _LONGEST_NAME:
            raise ValueError(f"invalid name length {length}")
        name = file.read(length).decode("utf-8")
        calls, columns = struct.unpack("<ii", file.read(8))
        if not 0 < 4 * columns <= size - file.tell():
            raise ValueError(f"{name} has an invalid size")
        yield name, calls, np.frombuffer(file.read(4 * columns), np.float32)


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
    values, dataset, chunks = _of_gguf(path) if is_gguf else _of_dat(path)
    for name, found in values.items():
        if not np.isfinite(found).all():
            raise InputRefused(f"the importance matrix has NaN or infinity for {name}", hint=_HINT)
    about: dict[str, str | int] = {"quantize.imatrix.file": path.name[:_LONGEST_TEXT]}
    if dataset is not None:
        about["quantize.imatrix.dataset"] = dataset[:_LONGEST_TEXT]
    about["quantize.imatrix.entries_count"] = len(values)
    if chunks > 0:
        about["quantize.imatrix.chunks_count"] = chunks
    return Importance(values=values, about=about)


def _of_gguf(path: Path) -> tuple[dict[str, np.ndarray], str | None, int]:
    header = read_header(path)
    entries, values = header.tensors, {}
    with np.errstate(divide="ignore", invalid="ignore"), path.open("rb") as file:
        for name in [name for name in entries if name.endswith(".in_sum2")]:
            plain = name.removesuffix(".in_sum2")
            sums = _floats(file, entries[name], header.size)
            # Rounded as lround does: halves away from zero.
            counts = np.floor(_floats(file, entries[f"{plain}.counts"], header.size) + 0.5)[:, None]
            each = sums.reshape(counts.size, -1) / counts.astype(np.float32)
            values[plain] = np.where(counts > 0, each, np.float32(1))
    datasets = strings(header.values[_DATASETS]) if _DATASETS in header.values else []
    chunks = number(header.values[_CHUNKS]) if _CHUNKS in header.values else 0
    return values, datasets[0] if datasets else None, chunks


def _floats(file: IO[bytes], entry: GgufTensorInfo, start: int) -> np.ndarray:
    file.seek(start + entry.offset)
    return np.frombuffer(file.read(4 * entry.rows * entry.columns), np.float32)


def _of_dat(path: Path) -> tuple[dict[str, np.ndarray], str | None, int]:
    """Read llama.cpp's older format: entries, then perhaps chunks and the dataset's name."""
    with path.open("rb") as file:
        values = {
            name: sums / np.float32(calls) if calls > 0 else sums
            for name, calls, sums in _dat_entries(file, path.stat().st_size)
        }
        rest = file.read()
    chunks = struct.unpack_from("<i", rest)[0] if len(rest) >= 4 else 0
    length = struct.unpack_from("<i", rest, 4)[0] if len(rest) >= 8 else 0
    name = rest[8 : 8 + length].split(b"\0")[0].decode("utf-8") if length > 0 else ""
    return values, name or None, chunks
