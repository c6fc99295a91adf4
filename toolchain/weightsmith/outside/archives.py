"""Unpacks the model in a tar archive, which is untrusted.

Links, devices and paths that leave the folder are refused wherever they are in it: no tool that
packs a model writes them. A compressed archive may unpack to eight times its size, since weights
do not compress, and to 64 MiB in any case.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import tarfile
import unicodedata
import zlib
from collections.abc import Callable, Collection
from pathlib import Path
from typing import IO, cast

from weightsmith.core.errors import InputRefused
from weightsmith.core.trees import remove
from weightsmith.models.folder import MAX_DEPTH, is_pickle, is_used
from weightsmith.oci.streams import TarEntry

_CHUNK = 1 << 20
_LEAST_ROOM, _MOST_RATIO = 64 << 20, 8
_MOST_ENTRIES = 20_000
_LONGEST_NAME = 255
WEIGHTS = (".safetensors", ".gguf")
_MARKS = ("config.json", "adapter_config.json")
_HARMFUL = "do not use it: no tool that packs models writes such an archive"


def extract(
    archive: Path, folder: Path, source: str, require_room: Callable[[int, str], None]
) -> dict[str, str]:
    """Unpack a model's files into a folder, without the folders above it; return their SHA-256.

    Raises InputRefused for an archive that is damaged, harmful, or has no model or several.
    """
    most = max(_LEAST_ROOM, _MOST_RATIO * archive.stat().st_size)
    require_room(archive.stat().st_size, source)
    digests: dict[str, str] = {}
    pickles: list[str] = []
    try:
        with archive.open("rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            stream = gzip.GzipFile(fileobj=raw) if packed else raw
            bounded = _Bounded(cast("IO[bytes]", stream), most, source)
            with tarfile.open(
                fileobj=cast("IO[bytes]", bounded), mode="r|", tarinfo=TarEntry
            ) as entries:
                _unpack(entries, folder, source, digests, pickles)
    except (tarfile.TarError, zlib.error, EOFError, ValueError, gzip.BadGzipFile) as error:
        raise InputRefused(
            f"{source}: not a readable tar archive: {str(error)[:200]}",
            hint="pack it again: tar -cf model.tar -C FOLDER .",
        ) from None
    require_weights(digests, source, pickles)
    root = model_root(digests, source)
    found = {}
    for path, digest in digests.items():
        if path.startswith(root):
            inner = path.removeprefix(root)
            found[inner] = digest
    keep_only(folder, root, found)
    return found


def require_weights(paths: Collection[str], source: str, pickles: Collection[str]) -> None:
    """Raise InputRefused if no file has weights that are read; `pickles` are others that might."""
    if any(path.endswith(WEIGHTS) for path in paths):
        return
    if pickles:
        raise InputRefused(
            f"{source} has only pickle files, which can run code: {', '.join(sorted(pickles)[:3])}",
            hint="convert them to safetensors where they are kept",
        )
    raise InputRefused(
        f"{source} has no .safetensors or .gguf file",
        hint="name the folder, archive or image that has config.json or adapter_config.json too",
    )


def model_root(paths: Collection[str], source: str) -> str:
    """Return the folder of the only model among files, with `/` at its end, or empty.

    It is the one nearest to the top with a configuration or a GGUF file. Raises InputRefused if
    there is none, or more than one.
    """
    marked = {
        path[: -len(path.rpartition("/")[2])]
        for path in paths
        if path.rpartition("/")[2] in _MARKS or path.endswith(".gguf")
    }
    if not marked:
        raise InputRefused(
            f"{source} has no model: no config.json, adapter_config.json or .gguf file",
            hint="pack the folder that has them",
        )
    depth = min(path.count("/") for path in marked)
    top = sorted(path for path in marked if path.count("/") == depth)
    if len(top) > 1:
        raise InputRefused(
            f"{source} has several models: {', '.join(top[:5])}",
            hint="give one with a single model",
        )
    return top[0]


def clean_path(name: str, source: str) -> str:
    """Return an entry's relative path; raises InputRefused if it leaves the folder."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if (
        name.startswith("/")
        or ".." in parts
        or not name.isprintable()
        or "\\" in name
        or len(parts) > MAX_DEPTH
        or any(len(part.encode()) > _LONGEST_NAME for part in parts)
    ):
        raise InputRefused(
            f"{source} has a file with a path that leaves its folder, or cannot be one: "
            f"{name[:200]!r}",
            hint=_HARMFUL,
        )
    return "/".join(parts)


def _unpack(
    entries: tarfile.TarFile,
    folder: Path,
    source: str,
    digests: dict[str, str],
    pickles: list[str],
) -> None:
    seen: set[str] = set()
    count = 0
    while (entry := entries.next()) is not None:
        entries.members.clear()  # type: ignore[attr-defined]  # they would accumulate
        count += 1
        if count > _MOST_ENTRIES:
            raise InputRefused(f"{source} has more than {_MOST_ENTRIES} files", hint=_HARMFUL)
        path = clean_path(entry.name, source)
        if entry.isdir():
            continue
        if not entry.isreg():
            kind = "a link" if entry.issym() or entry.islnk() else "a device or a pipe"
            raise InputRefused(
                f"{source} has {kind}: {path[:200]!r}",
                hint="pack it with --dereference, which copies what links point to",
            )
        if is_pickle(path):
            pickles.append(path)
        if not path or not is_used(path):
            continue
        folded = unicodedata.normalize("NFC", path).casefold()
        if folded in seen:
            raise InputRefused(f"{source} has two files named {path!r}", hint=_HARMFUL)
        seen.add(folded)
        content = entries.extractfile(entry)
        if content is None:
            raise tarfile.ReadError(f"{path!r} has no content")
        digests[path] = write_file(content, folder / path, source)


def write_file(content: IO[bytes], target: Path, source: str) -> str:
    """Write a new file to the disk and return its SHA-256; raises InputRefused if it cannot be."""
    state = hashlib.sha256()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        file = target.open("xb")
    except (FileExistsError, NotADirectoryError, IsADirectoryError):
        raise InputRefused(
            f"{source} has {target.name!r} as a file and as a folder", hint=_HARMFUL
        ) from None
    with file as out:
        while chunk := content.read(_CHUNK):
            state.update(chunk)
            out.write(chunk)
        out.flush()
        os.fsync(out.fileno())
    return state.hexdigest()


def keep_only(folder: Path, root: str, kept: Collection[str]) -> None:
    """Leave only these files of the folder `root` in a folder, in its place."""
    if not root:
        return
    aside = folder.parent / "unpacked"
    folder.rename(aside)
    folder.mkdir()
    for path in kept:
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        (aside / root / path).rename(target)
    remove(aside)


class _Bounded:
    """A stream that may not have more than so many bytes."""

    def __init__(self, stream: IO[bytes], most: int, source: str) -> None:
        self._stream = stream
        self._left = most
        self._most = most
        self._source = source

    def read(self, size: int) -> bytes:
        """Return up to `size` bytes; InputRefused if there are too many."""
        data = self._stream.read(size)
        self._left -= len(data)
        if self._left < 0:
            raise InputRefused(
                f"{self._source} unpacks to more than {self._most} bytes", hint=_HARMFUL
            )
        return data
