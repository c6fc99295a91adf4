"""Read a GGUF model of one or several files, and its tensors by the checkpoint's names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from weightsmith.core.errors import CheckFailed, Unmeasurable
from weightsmith.core.values import Json
from weightsmith.models.gguf_config import gguf_models, parts_of
from weightsmith.models.tensors import CheckpointTensors

_HINT = "create it again; a common cause is a full disk"


class GGUFModel:
    """The open files of one model."""

    def __init__(self, files: Sequence[Path]) -> None:
        """Raise CheckFailed unless the files are complete and are all parts of one model."""
        # Imported here to keep listing the formats fast.
        from weightsmith.models.gguf_reader import GGUFReader

        if not files:
            raise CheckFailed("no GGUF file found", hint=_HINT)
        if tuple(path.name for path in files) != parts_of(files[0].name):
            raise CheckFailed(
                f"{files[0].name} and {len(files) - 1} more files are not all the parts of one "
                "model",
                hint=_HINT,
            )
        self.files, self._readers = tuple(files), []
        for path in files:
            try:
                reader = GGUFReader(path)
            except (OSError, ValueError) as error:
                raise CheckFailed(
                    f"{path.name} is not a valid GGUF file: {error}", hint=_HINT
                ) from None
            self._readers.append(reader)
            spans = [(int(tensor.data_offset), int(tensor.n_bytes)) for tensor in reader.tensors]
            end = sum(max(spans, default=(0, 0)))
            padded = -(-end // reader.alignment) * reader.alignment
            if spans and path.stat().st_size not in {end, padded}:
                raise CheckFailed(
                    f"{path.name} has {path.stat().st_size} bytes, but its tensors end at {padded}",
                    hint=_HINT,
                )
        self.tensors: dict[str, Any] = {t.name: t for r in self._readers for t in r.tensors}
        self.places = {
            t.name: path.name
            for path, r in zip(files, self._readers, strict=True)
            for t in r.tensors
        }
        """Tensor -> name of its file."""
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
        field = self._readers[0].fields.get(key)
        try:
            return None if field is None else field.contents()
        except ValueError as error:
            raise CheckFailed(f"{self.name}: {key} is damaged: {error}", hint=_HINT) from None


# The converter's changes per architecture (conversion/*.py of llama.cpp).
_PERMUTED = frozenset({"llama", "granite", "smollm3", "arcee"})
"""Rows of Q and K are permuted from halves of a head to neighbouring pairs (LlamaModel.permute)."""
_Q_OR_K = re.compile(r"\.self_attn\.(.*\.)?(?P<name>[qk])_proj\.")
_NORM_PLUS_ONE = frozenset({"gemma", "gemma2", "gemma3"})
_UNCHANGED = frozenset(
    {
        "cohere2", "command-r", "olmo2", "phi3", "qwen2", "qwen2moe", "qwen3", "qwen3moe",
        "starcoder2",
    }
)  # fmt: skip
_TEXT = re.compile(r"(language|text)_model\.")
"""The part of a name that says which part of a model a tensor belongs to."""
_EXPERT = re.compile(r"\.experts\.(\d+)\.")


def open_view(artifact: Path, model: Path) -> GGUFView:
    """Return the tensors of a folder's GGUF files by the names of the checkpoint in `model`.

    A projector is none of them; `artifact` may be a file. Raises Unmeasurable for an unsupported
    architecture.
    """
    names = gguf_models(path.name for path in artifact.glob("[!.]*.gguf"))
    files = [artifact] if artifact.is_file() else [artifact / name for name in names]
    return GGUFView(GGUFModel(files), model)


def tensors_of(read: GGUFModel, names: Iterable[str]) -> dict[str, tuple[str, int | None]]:
    """Return the file's tensor, and of stacked experts the number, of a checkpoint's tensors.

    Those that the file does not have, or under a name that llama.cpp's table lacks, are left out.
    """
    import gguf

    architecture = str(read.value("general.architecture"))
    arch = {text: kind for kind, text in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    known = gguf.get_tensor_name_map(arch, int(read.value(f"{architecture}.block_count")))
    places: dict[str, tuple[str, int | None]] = {}
    for name in names:
        expert = _EXPERT.search(name)
        plain = _TEXT.sub("", _EXPERT.sub(".experts.", name), count=1)
        place = known.get_name(plain, try_suffixes=(".weight", ".bias"))
        if plain == "lm_head.weight" and place not in read.tensors:
            place = "token_embd.weight"  # tied
        if place in read.tensors:
            places[name] = (place, int(expert[1]) if expert else None)
    return places


class GGUFView:
    """A View of GGUF files, dequantized by the `gguf` package."""

    def __init__(self, read: GGUFModel, model: Path) -> None:
        """Map the checkpoint's tensors to the file's."""
        self._read = read
        self._arch = str(read.value("general.architecture"))
        if self._arch not in _PERMUTED | _NORM_PLUS_ONE | _UNCHANGED:
            raise Unmeasurable(
                f"measuring GGUF files of architecture {self._arch} is not supported",
                hint="use the task score instead",
            )
        self._places = tensors_of(read, CheckpointTensors(model).names)
        self.names = frozenset(self._places)
        """Names of the tensors."""

    def tensor(self, name: str) -> npt.NDArray[np.float32]:
        """Return one tensor as float32, in the checkpoint's shape and order."""
        return self.rows(name, 0, None)

    def kind(self, name: str) -> str:
        """Return the tensor's type, such as `q4_k`."""
        return str(self._read.tensors[self._places[name][0]].tensor_type.name).lower()

    def rows(self, name: str, start: int, stop: int | None) -> npt.NDArray[np.float32]:
        """Return some rows of such a tensor; only they are dequantized."""
        import gguf

        place, expert = self._places[name]
        found = self._read.tensors[place]
        data = found.data if expert is None else found.data[expert]
        if self._arch in _PERMUTED and (which := _Q_OR_K.search(name)):
            heads = self._read.value(f"{self._arch}.attention.head_count")
            if which["name"] == "k":
                heads = self._read.get(f"{self._arch}.attention.head_count_kv") or heads
            pairs = np.arange(len(data)).reshape(int(heads), -1, 2)
            data = data[pairs.swapaxes(1, 2).reshape(-1)[start:stop]]
        else:
            data = data[start:stop]
        try:
            values: npt.NDArray[np.float32] = gguf.dequantize(data, found.tensor_type)
        except NotImplementedError:  # Q1_0, as of 0.19
            raise Unmeasurable(
                f"the gguf package cannot dequantize {found.tensor_type.name}",
                hint="use the task score instead",
            ) from None
        return (
            values - 1 if self._arch in _NORM_PLUS_ONE and name.endswith("norm.weight") else values
        )
