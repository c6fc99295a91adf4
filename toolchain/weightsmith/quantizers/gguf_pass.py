"""Quantize tensors one by one into GGUF files, with the bytes of llama-quantize.

A journal has offset, size and sha256 of each part that was written, computed in memory before the
part goes to the disk; the next run reads these parts and makes those tensors again that differ. A
line is written once its tensor is on the disk. After the disk has lost a write, no more lines are
written, since the system tells of it only once.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np

from weightsmith.core.errors import InputRefused
from weightsmith.core.json_objects import JsonObject
from weightsmith.core.kernels import quants
from weightsmith.core.safe_parse import parse
from weightsmith.core.values import JsonValue
from weightsmith.models.reshard import cut, repeated_bytes
from weightsmith.quantizers.gguf_header import (
    GgufHeader,
    GgufTensorInfo,
    changed_values,
    placed,
    quantized,
    split_values,
)
from weightsmith.quantizers.gguf_importance import Importance
from weightsmith.quantizers.gguf_rows import Read

_SOME = 1 << 20
"""Bytes that are read at a time."""
_BLOCK = 1 << 20
"""Weights per block: as many as the merge computes at a time, which takes longer for fewer."""
_AHEAD = 2 * _BLOCK
"""Weights of earlier tensors that may be unfinished when a tensor is started."""
_FLOATS = ("F32", "F16", "BF16")
_LINE = re.compile(
    r"\[ *\d+/ *\d+\] (?P<name>\S+) +- \[.*\], type = +(?P<kind>\w+), size = +[^(]*"
    r"(?:\((?P<target>\w+)\))?\s*"
)
_MEASURED = ("IQ3_XXS", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ1_M", "IQ1_S")
"""Types that need importance (llama-quant.cpp's tensor_requires_imatrix)."""
_NEVER_MEASURED = ("token_embd.weight", "per_layer_token_embd.weight", "output.weight")
_Q2_K_S = 21
_PART = "model"
"""Begin of a part's name, which all models of a base have in common."""
_Written: TypeAlias = dict[int, tuple[int, int, str]]
"""What a block wrote, by its output: offset, bytes and their sha256."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PassFile(JsonObject):
    """One file to write; paths are absolute or relative to the program's folder."""

    out: str
    format: str
    direct: bool
    """The converter writes this type itself."""
    tensor_types: Mapping[str, str] = field(default_factory=dict)
    importance: str = ""
    """File of the importance matrix; empty: none."""
    overrides: Mapping[str, str] = field(default_factory=dict)
    """Keys to set, such as the licence."""
    mix: Mapping[str, JsonValue] = field(default_factory=dict)
    """What a mix is made of (`gguf_mix`); empty: it is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportanceWalk(JsonObject):
    """What our walk measures first, as far as no interrupted run has; paths are absolute."""

    model: str
    """The checkpoint's folder."""
    texts: str
    """JSON Lines: calibration texts as they were given."""
    out: str
    """The importance matrix; empty: there is none."""
    losses: str = ""
    """What each type of each tensor loses; empty: nobody asks."""
    low: bool = False
    """Whether losses are also of types below four bits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PassSettings(JsonObject):
    """What to quantize, and how; paths are absolute or relative to the program's folder."""

    convert: tuple[str, ...]
    """The converter and its arguments but for a file's name and type; empty: `middle` has its
    output already."""
    middle: str
    """The unquantized file, or the stem of its parts; empty if all files are `direct`."""
    between: str
    """The unquantized file's type."""
    quantize: str
    """llama-quantize."""
    threads: int
    """0: one per CPU."""
    split: bool
    """Write parts, as many as the unquantized file has."""
    by_kind: bool = False
    """Write parts of one kind of matrix each, besides a first one with the model's values."""
    files: tuple[PassFile, ...]
    """What to write, all in one pass over the weights."""
    walk: ImportanceWalk | None = None
    """What measures the files' importance; None: nothing does, or it lies there."""
    losses: str = ""
    """What each type of each tensor loses, for mixes."""
    projectors: tuple[str, ...] = ()
    """Where the converter's projector for pictures belongs; empty: none."""
    allow_text_only: bool = False
    """Whether there may be none because it cannot be converted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TypeChange:
    """A tensor's type before and after, as `llama-quantize --dry-run` says."""

    name: str
    kind: str
    target: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufSource:
    """One unquantized file: its header, and where its tensors' data comes from."""

    header: GgufHeader
    rows: Callable[[GgufTensorInfo, str], Read]
    """(tensor, type) -> its rows; called once per tensor, in order."""
    stored: Callable[[GgufTensorInfo, str], np.ndarray]
    """(tensor, type) -> uint8: the data of a type that is no float."""
    place: Callable[[str], tuple[str, int]] = lambda _: ("", 0)
    """Tensor -> file and offset of its first data: it is best read in this order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufOutput:
    """A file to write, and the types of its tensors in llama-quantize's order."""

    path: Path
    targets: Sequence[TypeChange]
    file_type: int
    importance: Importance = field(default_factory=Importance)
    overrides: Mapping[str, str | int] = field(default_factory=dict)
    """Keys of the user's, before those of the importance matrix."""
    key: str = ""
    """Identifies the inputs: an unfinished file is continued only if it is the same."""
    start: bytes = b""
    """The file's own bytes before the data; empty: as llama-quantize makes them."""
    whole: Mapping[str, Callable[[], np.ndarray]] = field(default_factory=dict)
    """Tensor -> its data, uint8, where rows of the source are not the same."""
    header: GgufHeader | None = None
    """Of a part: its values and tensors; None for all of the source's."""


def read_targets(printed: Sequence[str]) -> list[TypeChange]:
    """Return the tensors in llama-quantize's order from what `--dry-run` printed."""
    found = [match for line in printed if (match := _LINE.fullmatch(line.rstrip()))]
    return [
        TypeChange(
            name=match["name"],
            kind=match["kind"].upper(),
            target=(match["target"] or match["kind"]).upper(),
        )
        for match in found
    ]


def write_files(source: GgufSource, outputs: Sequence[GgufOutput], threads: int) -> None:
    """Write files below their unfinished names, or go on with them; `finish` gives them their own.

    Each row of the source is read once for all of them. Raises InputRefused for NaN, infinity, and
    types that llama-quantize refuses; ValueError if targets are not exactly the header's tensors.
    """
    with ExitStack() as stack:
        files = [stack.enter_context(_opened(source.header, output)) for output in outputs]
        names = {target.name for output in outputs for target in output.targets}
        writer = _Writer(threads)
        with writer.running():
            wanted = [name for name in source.header.tensors if name in names]
            for name in sorted(wanted, key=source.place):
                if left := [f for f in files if name in f.targets and name not in f.done]:
                    writer.add(source, source.header.tensors[name], left)
        for file in files:
            os.fsync(file.out)


@dataclass(frozen=True, slots=True, kw_only=True)
class _File:
    out: int
    log: int
    """Its journal."""
    output: GgufOutput
    targets: Mapping[str, TypeChange]
    offsets: Mapping[str, int]
    done: frozenset[str]
    """Tensors that an interrupted run has finished."""


@contextmanager
def _opened(header: GgufHeader, output: GgufOutput) -> Iterator[_File]:
    """Begin a file, or open it again with the tensors that it has."""
    header = output.header or header
    tensors, targets = header.tensors, output.targets
    if different := {t.name for t in targets} ^ tensors.keys():
        raise ValueError(f"the header and llama-quantize --dry-run differ in {sorted(different)}")
    start, sized = output.start, dict[str, tuple[int, int]]()
    for target in targets:
        if not start:
            _check(target, output)
        entry = tensors[target.name]
        size = quants.row_bytes(target.target, entry.columns) * entry.rows
        sized[target.name] = quants.number(target.target), size
    offsets = placed(sized, len(start))
    if not start:
        changes = changed_values(output.file_type, {**output.overrides, **output.importance.about})
        start, offsets = quantized(header, sized, changes)
    partial, journal = _unfinished(output.path)
    key = hashlib.sha256(start + output.key.encode()).hexdigest()
    spans = {name: (offsets[name], bytes_) for name, (_, bytes_) in sized.items()}
    end = max(map(sum, spans.values()), default=len(start))
    done = frozenset[str]()
    if journal.is_file() and partial.is_file():
        first, *lines = journal.read_text("utf-8", errors="replace").split("\n")
        with partial.open("rb") as begun:
            names = [_finished(line, begun, spans) for line in lines] if first == key else []
        done = frozenset(filter(None, names))
    with partial.open("r+b" if done else "wb") as file, journal.open("a" if done else "w") as log:
        log.write("\n" if done else key + "\n")  # the last line may have been cut off
        log.flush()
        file.write(start)
        file.truncate(-(-end // 32) * 32)
        file.flush()
        yield _File(
            out=file.fileno(),
            log=log.fileno(),
            output=output,
            targets={target.name: target for target in targets},
            offsets=offsets,
            done=done,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sized:
    name: str
    dtype: str
    size: int


def parts_by_kind(
    header: GgufHeader, output: GgufOutput, largest: Callable[[int], int]
) -> list[GgufOutput]:
    """Return the parts of a file: its values, then files of one kind of matrix each.

    Number, names and tensors of the parts depend on the tensors' names and sizes alone, so what
    adapters leave unchanged has the same bytes in all models of a base. What is the model's own,
    such as its name and vocabulary, is in the first. `largest` gets the bytes of the model's layers
    and returns the limit of a part.
    """
    sizes = {
        target.name: quants.row_bytes(target.target, header.tensors[target.name].columns)
        * header.tensors[target.name].rows
        for target in output.targets
    }
    tensors = [_Sized(name=name, dtype="U8", size=size) for name, size in sizes.items()]
    groups = cut(tensors, largest(repeated_bytes(tensors)))
    parts: list[frozenset[str]] = [frozenset()]
    parts += [frozenset(one.name for one in groups[name]) for name in sorted(groups)]
    made = []
    for number, names in enumerate(parts):
        own = split_values(number, len(parts), len(tensors))
        made.append(
            replace(
                output,
                path=output.path.with_name(f"{_PART}-{number + 1:05d}-of-{len(parts):05d}.gguf"),
                targets=[target for target in output.targets if target.name in names],
                start=b"",
                header=GgufHeader(
                    values=own if number else {**header.values, **own},
                    tensors={name: header.tensors[name] for name in sorted(names)},
                    size=header.size,
                ),
            )
        )
    return made


def finish(files: Sequence[Path]) -> None:
    """Give written files their names."""
    for out in files:
        partial, journal = _unfinished(out)
        partial.rename(out)
        journal.unlink()


def _unfinished(out: Path) -> tuple[Path, Path]:
    return out.with_name(f".{out.name}.partial"), out.with_name(f".{out.name}.journal")


def _finished(line: str, file: IO[bytes], spans: Mapping[str, tuple[int, int]]) -> str:
    """Return a line's tensor if the file has what it says, or an empty name.

    `spans` are offset and bytes of each tensor. A line may have been cut off.
    """
    try:
        name, *pieces = parse(line)
        at, left = spans[name]
        for start, size, sha256 in pieces:
            if start != at:
                return ""
            state = hashlib.sha256()
            file.seek(at)
            for done in range(0, size, _SOME):
                state.update(file.read(min(_SOME, size - done)))
            if sha256 != state.hexdigest():
                return ""
            at, left = at + size, left - size
    except (ValueError, TypeError, KeyError):
        return ""
    return "" if left else str(name)


def _check(one: TypeChange, output: GgufOutput) -> None:
    if one.kind == one.target:
        return
    if one.kind not in _FLOATS:
        raise InputRefused(
            f"{one.name} is already quantized ({one.kind})",
            hint="use a 16-bit model, or leave this tensor's type as it is (tensor_types)",
        )
    measured = (*_MEASURED, "Q2_K") if output.file_type == _Q2_K_S else _MEASURED
    needed = one.target in measured and one.name not in _NEVER_MEASURED
    if needed and one.name not in output.importance.values:
        raise InputRefused(
            f"{one.name} has no importance, which {one.target} needs",
            hint="set imatrix to auto or to a file that has this tensor, or choose another "
            "type (tensor_types)",
        )


class _Writer:
    """Quantizes blocks of rows in threads, and notes a tensor once its data is on the disk."""

    def __init__(self, threads: int) -> None:
        self._pool = ThreadPoolExecutor(threads, "rows")
        self._noter = ThreadPoolExecutor(1, "journal")
        self._waiting: list[tuple[int, list[Future[_Written]]]] = []
        """Weights and blocks of tensors that are being computed."""
        self._notes: list[Future[None]] = []
        self._lost: OSError | None = None
        """Why something may not be on the disk."""

    @contextmanager
    def running(self) -> Iterator[None]:
        """Wait for all work at the end, and note what is finished after an error, too."""
        try:
            yield
            for note in self._notes:
                note.result()
        finally:
            started = [block for _, blocks in self._waiting for block in blocks]
            failed = any(block.done() and block.exception() for block in started)
            self._pool.shutdown(cancel_futures=failed)
            self._noter.shutdown()

    def add(self, source: GgufSource, entry: GgufTensorInfo, files: Sequence[_File]) -> None:
        """Start a tensor; returns while its last blocks are being computed."""
        name, blocks = entry.name, list[Future[_Written]]()
        blocks.extend(
            self._pool.submit(self._copy, name, file.output.whole[name](), file)
            for file in files
            if name in file.output.whole
        )
        sharing = [file for file in files if name not in file.output.whole]
        kind = sharing[0].targets[name].kind if sharing else ""
        if kind in _FLOATS:
            blocks += self._blocks(source.rows(entry, kind), entry, sharing)
        elif sharing:
            data = source.stored(entry, kind)
            blocks += [self._pool.submit(self._copy, name, data, file) for file in sharing]
        self._waiting.append((entry.rows * entry.columns, blocks))
        self._notes.append(self._noter.submit(self._note, name, blocks, files))
        # Nobody waits for the disk here: the notes are taken while the next tensors are computed.
        while sum(weights for weights, _ in self._waiting[:-1]) > _AHEAD:
            for block in self._waiting[0][1]:
                block.result()
            self._waiting.pop(0)
        while self._notes and self._notes[0].done():
            self._notes.pop(0).result()

    def _blocks(
        self, rows: Read, entry: GgufTensorInfo, files: Sequence[_File]
    ) -> list[Future[_Written]]:
        matrices = entry.shape[2] if len(entry.shape) > 2 else 1
        height, blocks = entry.rows // matrices, []
        changes = [file.targets[entry.name] for file in files]
        important = [
            None
            if one.kind == one.target
            else file.output.importance.of(entry.name, entry.columns, matrices)
            for file, one in zip(files, changes, strict=True)
        ]
        places = [
            (file.out, file.offsets[entry.name], quants.row_bytes(one.target, entry.columns))
            for file, one in zip(files, changes, strict=True)
        ]

        def quantize(start: int, end: int, matrix: int) -> _Written:
            block, written = rows(start, end), _Written()
            flat = block.reshape(-1)
            with np.errstate(over="ignore", invalid="ignore"):
                # If no weight is NaN or infinite, neither is the sum of their squares, as a rule:
                # that takes half the time of looking at each.
                squares = np.dot(flat, flat)
            if not np.isfinite(squares) and not np.isfinite(block).all():
                raise _not_finite(f"{entry.name} has NaN or infinite weights")
            for one, own, (out, at, size) in zip(changes, important, places, strict=True):
                importance = None if own is None else own[matrix]
                try:
                    made = quants.quantize_rows(one.target, block, importance)
                except ValueError as error:
                    raise _unfit(one, error) from None
                written[out] = _write(out, made, at + start * size)
            return written

        step = max(1, _BLOCK // entry.columns)
        for matrix in range(matrices):
            for start in range(matrix * height, (matrix + 1) * height, step):
                end = min(start + step, (matrix + 1) * height)
                blocks.append(self._pool.submit(quantize, start, end, matrix))
        return blocks

    def _copy(self, name: str, data: np.ndarray, file: _File) -> _Written:
        target = file.targets[name]
        try:
            quants.check_rows(target.target, data)
        except ValueError as error:
            raise _unfit(target, error) from None
        return {file.out: _write(file.out, data, file.offsets[name])}

    def _note(self, name: str, blocks: Sequence[Future[_Written]], files: Sequence[_File]) -> None:
        """Write a tensor's line to the journals when its data is on the disk.

        After an error, raises it each time: the system tells of a lost write once (man 2 fsync), so
        a later call proves nothing.
        """
        written = [block.result() for block in blocks]
        for file in files:
            if self._lost is None:
                try:
                    os.fdatasync(file.out)
                except OSError as error:
                    self._lost = error
            if self._lost is not None:
                raise self._lost
            pieces = sorted(block[file.out] for block in written if file.out in block)
            os.write(file.log, json.dumps([name, *pieces]).encode() + b"\n")


def _not_finite(message: str) -> InputRefused:
    return InputRefused(message, hint="the checkpoint is damaged, or its weights are far too large")


def _unfit(target: TypeChange, error: ValueError) -> InputRefused:
    if target.target == "F16":
        hint = "use q8_0, or another format with scales"
        return InputRefused(f"{target.name} overflows float16", hint=hint)
    return _not_finite(f"{target.name}: {error}")


def _write(out: int, data: np.ndarray, at: int) -> tuple[int, int, str]:
    """Write bytes to an offset of a file; return offset, size and sha256."""
    flat: Any = data.reshape(-1).view(np.uint8)
    view = memoryview(flat)
    piece = at, len(view), hashlib.sha256(view).hexdigest()
    while view:
        count = os.pwrite(out, view, at)
        view, at = view[count:], at + count
    return piece
