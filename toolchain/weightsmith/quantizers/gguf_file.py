"""A GGUF model as it lies on disk, in one file or in parts: its facts and its tensors."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from weightsmith.errors import CheckFailed
from weightsmith.values import Json

_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
_AGAIN = "make it again; a full disk is a common cause"


class GGUFModel:
    """The files of one model, opened; every tensor is in exactly one of them."""

    def __init__(self, files: Sequence[Path]) -> None:
        """Raise CheckFailed unless the files are whole and all parts of one model are there."""
        self.files = tuple(files)
        _check_parts(self.files)
        readers = [_open(path) for path in self.files]
        for path, reader in zip(self.files, readers, strict=True):
            _check_size(reader, path)
        self._first = readers[0]
        self.tensors: dict[str, Any] = {t.name: t for reader in readers for t in reader.tensors}
        if not self.tensors:
            raise CheckFailed(f"{self.name} holds no tensors", hint="convert it again")

    @property
    def name(self) -> str:
        """The first file's name, for messages."""
        return self.files[0].name

    def value(self, key: str) -> Json:
        """Return an entry; CheckFailed where it is not there."""
        found = self.get(key)
        if found is None:
            raise CheckFailed(f"{self.name} lacks {key}", hint="convert it again")
        return found

    def get(self, key: str) -> Json:
        """Return an entry, or None; CheckFailed where it is damaged."""
        field = self._first.fields.get(key)
        try:
            return None if field is None else field.contents()
        except ValueError as error:
            raise CheckFailed(f"{self.name}: {key} is damaged: {error}", hint=_AGAIN) from None


def model_files(folder: Path) -> list[Path]:
    """Return a folder's GGUF files, parts in their order; a single file stands for itself."""
    return [folder] if folder.is_file() else sorted(folder.glob("[!.]*.gguf"))


def _check_parts(files: Sequence[Path]) -> None:
    if not files:
        raise CheckFailed("there is no GGUF file", hint=_AGAIN)
    parts = [_PART.search(path.name) for path in files]
    counts = {int(part[2]) for part in parts if part}
    whole = len(files) == 1 and not parts[0]
    if not whole and (None in parts or counts != {len(files)}):
        raise CheckFailed(
            f"{files[0].name} and {len(files) - 1} more files are not all parts of one model",
            hint=_AGAIN,
        )


def _open(path: Path) -> Any:
    # Here, so that listing the formats stays light.
    from weightsmith.checkpoints.gguf_reader import GGUFReader

    try:
        return GGUFReader(path)
    except (OSError, ValueError) as error:
        raise CheckFailed(f"{path.name} is not a whole GGUF file: {error}", hint=_AGAIN) from None


def _check_size(reader: Any, path: Path) -> None:
    last = max(reader.tensors, key=lambda tensor: int(tensor.data_offset), default=None)
    if last is None:
        return
    end = int(last.data_offset) + int(last.n_bytes)
    padded = -(-end // reader.alignment) * reader.alignment
    size = path.stat().st_size
    if size not in {end, padded}:
        raise CheckFailed(f"{path.name} has {size} bytes, its tensors end at {padded}", hint=_AGAIN)
