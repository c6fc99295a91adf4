"""Read a GGUF model of one or several files: metadata and tensors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from weightsmith.core.errors import CheckFailed
from weightsmith.core.values import Json
from weightsmith.models.gguf_names import gguf_models
from weightsmith.models.gguf_parts import parts_of

_HINT = "create it again; a common cause is a full disk"


class GGUFModel:
    """The open files of one model."""

    def __init__(self, files: Sequence[Path]) -> None:
        """Raise CheckFailed unless the files are complete and are all parts of one model."""
        self.files = tuple(files)
        _check_parts(self.files)
        readers = [_open(path) for path in self.files]
        for path, reader in zip(self.files, readers, strict=True):
            _check_size(reader, path)
        self._first, self._readers = readers[0], readers
        self.tensors: dict[str, Any] = {t.name: t for reader in readers for t in reader.tensors}
        if not self.tensors:
            raise CheckFailed(f"{self.name} has no tensors", hint="convert it again")

    @property
    def name(self) -> str:
        """The first file's name, for messages."""
        return self.files[0].name

    def forget_pages(self) -> None:
        """Let the kernel take back what was read of the files; they are memory-mapped."""
        for reader in self._readers:
            reader.forget_pages()

    def value(self, key: str) -> Json:
        """Return a key's value; raise CheckFailed if it is missing."""
        found = self.get(key)
        if found is None:
            raise CheckFailed(f"{self.name} has no key {key}", hint="convert it again")
        return found

    def get(self, key: str) -> Json:
        """Return a key's value, or None; raise CheckFailed if it is damaged."""
        field = self._first.fields.get(key)
        try:
            return None if field is None else field.contents()
        except ValueError as error:
            raise CheckFailed(f"{self.name}: {key} is damaged: {error}", hint=_HINT) from None


def model_files(folder: Path) -> list[Path]:
    """Return a folder's GGUF files in order, but for a projector; for a file, the file itself."""
    if folder.is_file():
        return [folder]
    return [folder / name for name in gguf_models(path.name for path in folder.glob("[!.]*.gguf"))]


def _check_parts(files: Sequence[Path]) -> None:
    if not files:
        raise CheckFailed("no GGUF file found", hint=_HINT)
    if tuple(path.name for path in files) != parts_of(files[0].name):
        raise CheckFailed(
            f"{files[0].name} and {len(files) - 1} more files are not all the parts of one model",
            hint=_HINT,
        )


def _open(path: Path) -> Any:
    # Imported here to keep listing the formats fast.
    from weightsmith.models.gguf_reader import GGUFReader

    try:
        return GGUFReader(path)
    except (OSError, ValueError) as error:
        raise CheckFailed(f"{path.name} is not a valid GGUF file: {error}", hint=_HINT) from None


def _check_size(reader: Any, path: Path) -> None:
    last = max(reader.tensors, key=lambda tensor: int(tensor.data_offset), default=None)
    if last is None:
        return
    end = int(last.data_offset) + int(last.n_bytes)
    padded = -(-end // reader.alignment) * reader.alignment
    size = path.stat().st_size
    if size not in {end, padded}:
        raise CheckFailed(
            f"{path.name} has {size} bytes, but its tensors end at {padded}", hint=_HINT
        )
