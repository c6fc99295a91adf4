"""A GGUF model's dequantized tensors in the checkpoint's names and order."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightsmith.core.errors import Unmeasurable
from weightsmith.quantizers.gguf_file import GGUFModel, model_files

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

# The converter's changes per architecture (conversion/*.py of llama.cpp).
_PERMUTED = frozenset({"llama", "granite", "smollm3", "arcee"})
"""Rows of Q and K are permuted from halves of a head to neighbouring pairs (LlamaModel.permute)."""
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
    """Return a folder's GGUF tensors by the names of the checkpoint in `model`.

    Raises Unmeasurable for an unsupported architecture.
    """
    return GGUFView(GGUFModel(model_files(artifact)), model)


class GGUFView:
    """A View of GGUF files, dequantized by the `gguf` package."""

    def __init__(self, read: GGUFModel, model: Path) -> None:
        """Map the checkpoint's tensors to the file's."""
        from weightsmith.models.tensors import CheckpointTensors

        self._read = read
        self._arch = str(read.value("general.architecture"))
        if self._arch not in _PERMUTED | _NORM_PLUS_ONE | _UNCHANGED:
            raise Unmeasurable(
                f"measuring GGUF files of architecture {self._arch} is not supported",
                hint="use the task score instead",
            )
        self._places = self._find(CheckpointTensors(model).names)
        self.names = frozenset(self._places)
        """Names of the tensors."""

    def tensor(self, name: str) -> npt.NDArray[np.float32]:
        """Return one tensor as float32, in the checkpoint's shape and order."""
        return self._dequantized(name, slice(None))

    def rows(self, name: str, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Return some rows of such a tensor; only they are dequantized."""
        return self._dequantized(name, slice(start, stop))

    def kind(self, name: str) -> str:
        """Return the tensor's type, such as `q4_k`."""
        return str(self._read.tensors[self._places[name][0]].tensor_type.name).lower()

    def _dequantized(self, name: str, where: slice) -> npt.NDArray[np.float32]:
        import gguf

        place, expert = self._places[name]
        found = self._read.tensors[place]
        data = found.data if expert is None else found.data[expert]
        data = data[self._stored(name, len(data), where)]
        try:
            values: npt.NDArray[np.float32] = gguf.dequantize(data, found.tensor_type)
        except NotImplementedError:  # Q1_0, as of 0.19
            raise Unmeasurable(
                f"the gguf package cannot dequantize {found.tensor_type.name}",
                hint="use the task score instead",
            ) from None
        if self._arch in _NORM_PLUS_ONE and name.endswith("norm.weight"):
            return values - 1
        return values

    def _find(self, names: frozenset[str]) -> dict[str, tuple[str, int | None]]:
        import gguf

        arch = {text: kind for kind, text in gguf.MODEL_ARCH_NAMES.items()}[self._arch]
        blocks = int(self._read.value(f"{self._arch}.block_count"))
        known = gguf.get_tensor_name_map(arch, blocks)
        found: dict[str, tuple[str, int | None]] = {}
        for name in names:
            expert = _EXPERT.search(name)
            plain = _TEXT.sub("", _EXPERT.sub(".experts.", name), count=1)
            place = known.get_name(plain, try_suffixes=(".weight", ".bias"))
            if plain == "lm_head.weight" and place not in self._read.tensors:
                place = "token_embd.weight"  # tied
            if place in self._read.tensors:
                found[name] = (place, int(expert[1]) if expert else None)
        return found

    def _stored(self, name: str, count: int, where: slice) -> Any:
        """Return where the file has some of a tensor's rows, which are permuted in Q and K."""
        import numpy as np

        if self._arch not in _PERMUTED or ".self_attn." not in name:
            return where
        heads = self._read.value(f"{self._arch}.attention.head_count")
        if ".k_proj." in name:
            heads = self._read.get(f"{self._arch}.attention.head_count_kv") or heads
        elif ".q_proj." not in name:
            return where
        pairs = np.arange(count).reshape(int(heads), -1, 2)
        return pairs.swapaxes(1, 2).reshape(-1)[where]
