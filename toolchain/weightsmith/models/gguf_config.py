"""A GGUF file's model shape as keys of config.json."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from weightsmith.core.errors import InputRefused
from weightsmith.core.values import JsonValue

if TYPE_CHECKING:
    from gguf import ReaderField

    from weightsmith.models.gguf_reader import GGUFReader

_NAMES = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.value_length": "v_head_dim",
    "attention.sliding_window": "sliding_window",
    "context_length": "max_position_embeddings",
    "vocab_size": "vocab_size",
}
"""GGUF keys below the architecture's name: https://github.com/ggml-org/ggml docs/gguf.md."""


def gguf_config(path: Path) -> Mapping[str, JsonValue]:
    """Return a GGUF file's model shape; raise InputRefused if the file is invalid."""
    fields = _fields(path)
    architecture = _contents(path, fields["general.architecture"])
    if not isinstance(architecture, str):
        raise _unreadable(path, "general.architecture is not a string")
    config: dict[str, JsonValue] = {"model_type": architecture, "architectures": [architecture]}
    for key, name in _NAMES.items():
        if field := fields.get(f"{architecture}.{key}"):
            config[name] = _contents(path, field)
    if "vocab_size" not in config and (tokens := fields.get("tokenizer.ggml.tokens")):
        config["vocab_size"] = len(tokens.data)
    return config


def gguf_file_type(path: Path) -> int | None:
    """Return a GGUF file's llama_ftype (llama.h), or None if it is not set."""
    try:
        field = _fields(path).get("general.file_type")
        found = _contents(path, field) if field else None
    except InputRefused:
        return None
    return found if isinstance(found, int) else None


def gguf_tensor_types(path: Path) -> Mapping[str, int]:
    """Return how many weights of a GGUF file have each tensor type, most first.

    Raises InputRefused if the file is invalid.
    """
    weights = Counter[str]()
    for tensor in _reader(path).tensors:
        weights[tensor.tensor_type.name.lower()] += int(tensor.n_elements)
    return dict(weights.most_common())


def _contents(path: Path, field: ReaderField) -> JsonValue:
    try:
        found: JsonValue = field.contents()
    except ValueError as error:
        raise _unreadable(path, error) from None
    return found


def _reader(path: Path) -> GGUFReader:
    from weightsmith.models.gguf_reader import GGUFReader

    try:
        return GGUFReader(path)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from None


def _fields(path: Path) -> Mapping[str, ReaderField]:
    fields: Mapping[str, ReaderField] = _reader(path).fields
    if "general.architecture" not in fields:
        raise _unreadable(path, "it has no general.architecture")
    return fields


def _unreadable(path: Path, why: object) -> InputRefused:
    return InputRefused(
        f"{path}: invalid GGUF file: {why}", hint="it may be truncated: download it again"
    )
