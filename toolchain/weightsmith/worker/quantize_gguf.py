"""Program that quantizes a checkpoint, or a GGUF file, to a GGUF file of llama-quantize's bytes.

    python -m weightsmith.worker.quantize_gguf SETTINGS

llama.cpp's converter plans the tensors and computes them, one after the other; `llama-quantize
--dry-run` names their types. No 16-bit file is written: beside the output there is only its header,
with a hole in place of the data.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from weightsmith.drivers import process
from weightsmith.drivers.hardware import cores
from weightsmith.errors import InputRefused, WeightsmithError
from weightsmith.foreign import read_json
from weightsmith.kernels import quants
from weightsmith.quantizers.convert import run
from weightsmith.quantizers.gguf_header import Entry, read_header
from weightsmith.quantizers.gguf_importance import DIGEST_KEY, Importance, read_importance
from weightsmith.quantizers.gguf_lazy import computed, rows_of
from weightsmith.quantizers.gguf_pass import (
    Output,
    Source,
    Target,
    Wanted,
    finish,
    read_targets,
    write_files,
)
from weightsmith.quantizers.gguf_rows import Place, Read
from weightsmith.quantizers.gguf_settings import PassFile, PassSettings
from weightsmith.quantizers.gguf_types import FILE_TYPES
from weightsmith.quantizers.running import refusal
from weightsmith.worker.virtual import computed_for_program


def main() -> None:
    """Quantize as the settings file says."""
    try:
        with computed_for_program():
            _run(PassSettings.from_json(read_json(Path(sys.argv[1]))))
    except InputRefused as error:
        print(refusal(error), file=sys.stderr)  # noqa: T201
        sys.exit(error.exit_code)


class Fault(Exception):  # A name in -Error would be taken for an exception of the converter.
    """A fault of our own in the middle of the converter's run."""


def _run(settings: PassSettings) -> None:
    if not settings.convert:
        files = _parts(settings)
        _quantize(settings, files, [_of_file(path) for path in files])
        return

    def write(writer: Any) -> None:
        try:
            _quantize_written(settings, writer)
        except (WeightsmithError, MemoryError, OSError):
            raise
        except Exception as error:
            raise Fault(f"{type(error).__name__}: {error}") from error

    run(Path(settings.convert[0]), list(settings.convert[1:]), write)


def _quantize_written(settings: PassSettings, writer: Any) -> None:
    """Quantize what the converter would write."""
    files = _write_headers(writer)
    _quantize(
        settings, files, [_of_writer(p, t) for p, t in zip(files, writer.tensors, strict=True)]
    )
    for path in files:
        path.unlink()


def _quantize(settings: PassSettings, files: Sequence[Path], sources: Sequence[Source]) -> None:
    made = [_wanted(settings, file, files[0]) for file in settings.files]
    parts = [_parts_of(Path(file.out), settings, len(sources)) for file in settings.files]
    for number, source in enumerate(sources):
        outputs = [
            Output(
                path=paths[number],
                targets=[target for target in targets if target.name in source.header.tensors],
                wanted=wanted,
            )
            for paths, (wanted, targets) in zip(parts, made, strict=True)
        ]
        write_files(source, outputs, settings.threads or cores())
    finish([path for paths in parts for path in paths])


def _wanted(settings: PassSettings, file: PassFile, first: Path) -> tuple[Wanted, list[Target]]:
    """Return what a file should be, and the types of all tensors."""
    wanted = Wanted(
        file_type=FILE_TYPES[file.format].number,
        importance=read_importance(Path(file.importance)) if file.importance else Importance(),
        overrides={**_digest(file), **file.overrides},
        key=_key(settings),
    )
    return wanted, read_targets(_dry_run(settings, file, first))


def _digest(file: PassFile) -> dict[str, str]:
    """Return the key with the digest of the importance matrix."""
    if not file.importance:
        return {}
    with Path(file.importance).open("rb") as matrix:
        return {DIGEST_KEY: f"sha256:{hashlib.file_digest(matrix, 'sha256').hexdigest()}"}


def _parts_of(out: Path, settings: PassSettings, parts: int) -> list[Path]:
    if not settings.split:
        return [out]
    return [out.with_name(f"{out.stem}-{n:05d}-of-{parts:05d}.gguf") for n in range(1, parts + 1)]


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


def _key(settings: PassSettings) -> str:
    """Return the identity of the weights: names, sizes and times of their files."""
    folder = Path(settings.convert[1]) if settings.convert else Path(settings.middle).parent
    files = sorted(folder.glob("*.safetensors")) if settings.convert else _parts(settings)
    facts = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return json.dumps(facts)


def _parts(settings: PassSettings) -> list[Path]:
    middle = Path(settings.middle)
    parts = sorted(middle.parent.glob(f"{middle.stem}-*-of-*.gguf"))
    return parts or [middle]


def _of_file(path: Path) -> Source:
    header = read_header(path)

    def rows(entry: Entry, kind: str) -> Read:
        at = header.size + entry.offset
        place = Place(path=path, kind=kind, offset=at, rows=entry.rows, columns=entry.columns)
        return place.read

    def stored(entry: Entry, kind: str) -> np.ndarray:
        size = quants.row_bytes(kind, entry.columns) * entry.rows
        return np.fromfile(path, np.uint8, size, offset=header.size + entry.offset)

    return Source(header=header, rows=rows, stored=stored)


def _write_headers(writer: Any) -> list[Path]:
    """Write the converter's headers, each with a hole for its data; return the files."""
    writer.write_ti_data_to_file()
    for file, tensors in zip(writer.fout, writer.tensors, strict=True):
        writer.write_padding(file, file.tell())
        file.flush()
        data = sum(writer.ggml_pad(info.nbytes, writer.data_alignment) for info in tensors.values())
        os.ftruncate(file.fileno(), file.tell() + data)
    return [Path(name) for name in writer.format_shard_names(writer.path)]


def _of_writer(path: Path, tensors: Mapping[str, Any]) -> Source:
    def take(entry: Entry) -> Any:
        # Its data, once computed, is freed with the last block.
        info = tensors[entry.name]
        tensor, info.tensor = info.tensor, None
        return tensor

    return Source(
        header=read_header(path),
        rows=lambda entry, kind: rows_of(take(entry), kind, entry.columns),
        stored=lambda entry, _kind: computed(take(entry)),
    )


if __name__ == "__main__":
    main()
