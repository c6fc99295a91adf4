"""Program that quantizes a checkpoint, or a GGUF file, to GGUF files of llama.cpp's bytes.

    python -m weightsmith.worker.quantize_gguf SETTINGS

llama.cpp's converter plans the tensors and computes them, one after the other; `llama-quantize
--dry-run` names their types. No 16-bit file is written: beside the output there is only its header,
with a hole in place of the data. Types that the converter writes itself are planned by it, too,
once for each, since it alone knows their headers.

Importance is measured in a copy of this program (`forked`) while it starts: both need torch and
transformers, 1.3 CPU seconds, and the walk leaves one of two CPUs idle. The copy ends with the
program. It alone runs torch's loops for AVX2: powers, of which the converter makes Llama 3's rotary
factors, have other last bits there than with AVX-512.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from weightsmith.core.cpus import AVX2_LOOPS, has_avx2
from weightsmith.core.errors import WeightsmithError
from weightsmith.core.kernels import quants
from weightsmith.core.safe_parse import parse, read_json
from weightsmith.forward.libraries import import_models, load_torch_and_transformers
from weightsmith.merging.libc import keep_freed_memory
from weightsmith.oci.weights import fastest_layer
from weightsmith.outside import process
from weightsmith.outside.hardware import cores
from weightsmith.outside.process import forked
from weightsmith.quantizers.convert import run
from weightsmith.quantizers.gguf_header import GgufHeader, GgufTensorInfo, read_header
from weightsmith.quantizers.gguf_importance import DIGEST_KEY, Importance, read_importance
from weightsmith.quantizers.gguf_mix import UNMIXED, Mixed, guessed_type, mixed
from weightsmith.quantizers.gguf_pass import (
    GgufOutput,
    GgufSource,
    ImportanceWalk,
    PassFile,
    PassSettings,
    TypeChange,
    finish,
    parts_by_kind,
    read_targets,
    write_files,
)
from weightsmith.quantizers.gguf_rows import (
    Read,
    StoredRows,
    computed,
    is_stored,
    place_of,
    rows_of,
)
from weightsmith.quantizers.gguf_rules import require_matches
from weightsmith.quantizers.gguf_types import FILE_TYPES
from weightsmith.quantizers.running import progress_line, refusal
from weightsmith.worker.calibrating import importance, losses
from weightsmith.worker.virtual import computed_for_program

if TYPE_CHECKING:
    from gguf.gguf_writer import GGUFWriter, TensorInfo


def main() -> None:
    """Quantize as the settings file says."""
    # A second of searching for cycles while libraries and the vocabulary are loaded; few end.
    gc.disable()
    keep_freed_memory()
    try:
        settings = PassSettings.from_json(read_json(Path(sys.argv[1])))
        # Two processes must not share open files, so the walk's begins before any is open.
        with walking(settings.walk) as measured, computed_for_program():
            _run(settings, measured)
    except WeightsmithError as error:
        print(refusal(error), file=sys.stderr)  # noqa: T201
        end(error.exit_code)


def end(code: int = 0) -> None:
    """Exit at once: tearing the converter's libraries down takes half a second."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class Fault(Exception):  # A name in -Error would be taken for an exception of the converter.
    """A fault of our own in the middle of the converter's run."""


def _run(settings: PassSettings, measured: Callable[[], object]) -> None:
    """Quantize; `measured` is called when the importance matrix is needed."""
    if not settings.convert:
        middle = Path(settings.middle)
        files = sorted(middle.parent.glob(f"{middle.stem}-*-of-*.gguf")) or [middle]
        _quantize(settings, files, [_of_file(path) for path in files], files)
        return

    outs = [(Path(file.out), file.format) for file in settings.files if file.direct]
    # Places of headers that the converter writes.
    wanted = [(out.with_name(f".{out.name}.header"), format_) for out, format_ in outs]
    if settings.middle:
        wanted.append((Path(settings.middle), settings.between))
    plans: list[_Plan] = []

    def write(writer: GGUFWriter) -> None:
        try:
            writer.write_ti_data_to_file()
            for file, infos in zip(writer.fout, writer.tensors, strict=True):
                writer.write_padding(file, file.tell())
                file.flush()
                padded = (writer.ggml_pad(i.nbytes, writer.data_alignment) for i in infos.values())
                os.ftruncate(file.fileno(), file.tell() + sum(padded))  # a hole for the data
            paths = [Path(name) for name in writer.format_shard_names(writer.path)]
            plans.append(_Plan(files=paths, tensors=writer.tensors))
            if len(plans) == len(wanted):
                measured()
                _quantize_planned(settings, plans)
        except (WeightsmithError, MemoryError, OSError):
            raise
        except Exception as error:
            raise Fault(f"{type(error).__name__}: {error}") from error

    converter, model, *rest = settings.convert
    runs = [([*rest, "--outfile", str(out), "--outtype", kind], write) for out, kind in wanted]
    run(
        Path(converter),
        Path(model),
        *runs,
        projectors=[Path(p) for p in settings.projectors],
        allow_text_only=settings.allow_text_only,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """What the converter would write: headers, and the tensors of each."""

    files: Sequence[Path]
    tensors: Sequence[Mapping[str, TensorInfo]]


def _quantize_planned(settings: PassSettings, plans: Sequence[_Plan]) -> None:
    """Write what the converter planned; rows are those of the last plan."""
    source, kind = plans[-1], settings.between.upper() or "F32"
    apart = {
        name
        for plan in plans
        for name, info in plan.tensors[0].items()
        if not is_stored(info.tensor, kind, info.shape[-1])
    }
    directs = (file for file in settings.files if file.direct)
    direct = {
        file.format: _Direct.of(plan.files[0], plan.tensors[0], apart)
        for file, plan in zip(directs, plans, strict=False)
    }
    sources = [_of_writer(p, t) for p, t in zip(source.files, source.tensors, strict=True)]
    weights = sorted(Path(settings.convert[1]).glob("*.safetensors"))
    _quantize(settings, source.files, sources, weights, direct)
    for plan in plans:
        for path in plan.files:
            path.unlink()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Direct:
    """A file that the converter would write itself."""

    targets: list[TypeChange]
    start: bytes
    whole: Mapping[str, Callable[[], np.ndarray]]

    @classmethod
    def of(cls, path: Path, tensors: Mapping[str, TensorInfo], apart: Collection[str]) -> _Direct:
        """Share the source's rows, but for tensors `apart`: the converter computes these."""
        with path.open("rb") as file:
            start = file.read(read_header(path).size)
        return cls(
            targets=[
                TypeChange(name=name, kind="F32", target=info.dtype.name)
                for name, info in tensors.items()
            ],
            start=start,
            whole={name: partial(_whole, tensors[name]) for name in tensors if name in apart},
        )


def _quantize(
    settings: PassSettings,
    files: Sequence[Path],
    sources: Sequence[GgufSource],
    weights: Sequence[Path],
    direct: Mapping[str, _Direct] = MappingProxyType({}),
) -> None:
    """Write all files from the sources, which are parts of one; `direct` are some by format.

    Names, sizes and times of the files `weights` identify them.
    """
    stats = [(path.name, path.stat()) for path in weights]
    key = json.dumps([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])
    headers = [source.header for source in sources]
    made = [
        _output(settings, file, files[0], headers, key, direct.get(file.format))
        for file in settings.files
    ]
    if settings.by_kind:
        cut = [p for one in made for p in parts_by_kind(sources[0].header, one, fastest_layer)]
        write_files(sources[0], cut, settings.threads or cores())
        finish([one.path for one in cut])
        return
    outs, count = [Path(file.out) for file in settings.files], len(sources)
    parts = [[out] for out in outs]
    if settings.split:
        numbers = [f"{n:05d}-of-{count:05d}" for n in range(1, count + 1)]
        parts = [[out.with_name(f"{out.stem}-{n}.gguf") for n in numbers] for out in outs]
    for number, source in enumerate(sources):
        inside = source.header.tensors
        outputs = [
            replace(one, path=paths[number], targets=[t for t in one.targets if t.name in inside])
            for paths, one in zip(parts, made, strict=True)
        ]
        write_files(source, outputs, settings.threads or cores())
    finish([path for paths in parts for path in paths])


def _output(
    settings: PassSettings,
    file: PassFile,
    first: Path,
    headers: Sequence[GgufHeader],
    key: str,
    own: _Direct | None,
) -> GgufOutput:
    """Return what a file should be, whatever its parts; `own` is what the converter would write."""
    importance, overrides = Importance(), dict(file.overrides)
    if file.importance:
        importance = read_importance(Path(file.importance))
        with Path(file.importance).open("rb") as matrix:
            digest = hashlib.file_digest(matrix, "sha256").hexdigest()
        overrides = {DIGEST_KEY: f"sha256:{digest}", **overrides}
    if file.mix:
        chosen = _mixed(settings, file, first, headers)
        exactly = {f"^{re.escape(name)}$": kind for name, kind in chosen.types.items()}
        file = replace(file, format=guessed_type(chosen.types.values()), tensor_types=exactly)
        overrides |= chosen.about
    elif file.tensor_types:
        require_matches(file.tensor_types, [name for one in headers for name in one.tensors])
    return GgufOutput(
        path=Path(file.out),
        targets=own.targets if own else read_targets(_dry_run(settings, file, first)),
        file_type=FILE_TYPES[file.format].number,
        importance=importance,
        overrides=overrides,
        key=key,
        start=own.start if own else b"",
        whole=own.whole if own else {},
    )


def _mixed(
    settings: PassSettings, file: PassFile, first: Path, headers: Sequence[GgufHeader]
) -> Mixed:
    """Return the types of a mix; what llama-quantize leaves alone, it leaves alone in each type."""
    plain = read_targets(_dry_run(settings, replace(file, format=UNMIXED), first))
    losses = read_json(Path(settings.losses)) if settings.losses else {}
    return mixed(
        file.mix,
        {name: entry for header in headers for name, entry in header.tensors.items()},
        {one.name: (one.target, one.target != one.kind) for one in plain},
        losses,
        sum(header.size for header in headers),
    )


def _dry_run(settings: PassSettings, file: PassFile, first: Path) -> list[str]:
    """Return what llama-quantize says about types and order; it reads the header alone."""
    lines: list[str] = []
    types = (word for p, t in file.tensor_types.items() for word in ("--tensor-type", f"{p}={t}"))
    process.run(
        (
            *(settings.quantize, "--dry-run", *types),
            *(("--imatrix", file.importance) if file.importance else ()),
            *(("--keep-split",) if settings.split else ()),
            *(str(first), file.format.upper()),
        ),
        env=process.scrubbed(),
        on_line=lines.append,
    ).require("llama-quantize --dry-run", hint="the lines above are the program's own")
    return lines


def _of_file(path: Path) -> GgufSource:
    header = read_header(path)

    def rows(entry: GgufTensorInfo, kind: str) -> Read:
        at = header.size + entry.offset
        place = StoredRows(path=path, kind=kind, offset=at, rows=entry.rows, columns=entry.columns)
        return place.read

    def stored(entry: GgufTensorInfo, kind: str) -> np.ndarray:
        size = quants.row_bytes(kind, entry.columns) * entry.rows
        return np.fromfile(path, np.uint8, size, offset=header.size + entry.offset)

    return GgufSource(header=header, rows=rows, stored=stored)


def _of_writer(path: Path, tensors: Mapping[str, TensorInfo]) -> GgufSource:
    return GgufSource(
        header=read_header(path),
        rows=lambda entry, kind: rows_of(_take(tensors[entry.name]), kind, entry.columns),
        stored=lambda entry, _kind: computed(_take(tensors[entry.name])),
        place=lambda name: place_of(tensors[name].tensor),
    )


def _whole(info: TensorInfo) -> np.ndarray:
    return computed(_take(info))


def _take(info: TensorInfo) -> Any:
    """Return a tensor of the converter's; its data, once computed, is freed with its last use."""
    tensor, info.tensor = info.tensor, None
    return tensor


@contextmanager
def walking(walk: ImportanceWalk | None) -> Iterator[Callable[[], object]]:
    """Measure importance while the block runs; yield a function that waits for the file.

    Files that an interrupted run has finished are taken.
    """
    if walk is None or all(Path(out).is_file() for out in (walk.out, walk.losses) if out):
        yield lambda: None
        return
    load_torch_and_transformers()
    import_models()
    with forked(partial(_measure, walk), "measuring importance") as copy:
        yield copy.join


def _measure(walk: ImportanceWalk) -> None:
    gc.freeze()
    gc.enable()
    if has_avx2():
        os.environ.update(AVX2_LOOPS)

    def tell(done: int, total: int, unit: str) -> None:
        # In one call: the program that starts meanwhile writes to the same place.
        os.write(1, f"{progress_line(done, total, unit)}\n".encode())

    rows = [parse(line) for line in Path(walk.texts).read_text("utf-8").splitlines()]
    matrix, lost = Path(walk.out) if walk.out else None, Path(walk.losses)
    with computed_for_program(compared=False):
        if matrix and not matrix.is_file():
            importance(Path(walk.model), rows, matrix, tell)
        if walk.losses and not lost.is_file():
            from weightsmith.quantizers.layerwise.sensitivity import gguf_types

            losses(Path(walk.model), rows, matrix, lost, tell, gguf_types(low=walk.low))


if __name__ == "__main__":
    main()
    end()
