"""The shape of a GGUF file's model, in the terms of config.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weightsmith.errors import InputRefused
from weightsmith.values import Json

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


def gguf_config(path: Path) -> Mapping[str, Json]:
    """Return what a GGUF file says of its model's shape; InputRefused where it is not readable."""
    fields = _fields(path)
    architecture = _said(path, fields["general.architecture"])
    if not isinstance(architecture, str):
        raise _unreadable(path, "its general.architecture is no text")
    config: dict[str, Json] = {"model_type": architecture, "architectures": [architecture]}
    for key, name in _NAMES.items():
        if field := fields.get(f"{architecture}.{key}"):
            config[name] = _said(path, field)
    if "vocab_size" not in config and (tokens := fields.get("tokenizer.ggml.tokens")):
        config["vocab_size"] = len(tokens.data)
    return config


def gguf_file_type(path: Path) -> int | None:
    """Return llama.h's llama_ftype that a GGUF file says it has; None where it says nothing."""
    try:
        field = _fields(path).get("general.file_type")
        found = _said(path, field) if field else None
    except InputRefused:
        return None
    return found if isinstance(found, int) else None


def _said(path: Path, field: Any) -> Json:
    try:
        return field.contents()
    except ValueError as error:
        raise _unreadable(path, error) from None


def _fields(path: Path) -> Mapping[str, Any]:
    from weightsmith.checkpoints.gguf_reader import GGUFReader

    try:
        fields: Mapping[str, Any] = GGUFReader(path).fields
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from None
    if "general.architecture" not in fields:
        raise _unreadable(path, "it lacks general.architecture")
    return fields


def _unreadable(path: Path, why: object) -> InputRefused:
    return InputRefused(
        f"{path}: not a readable GGUF file: {why}", hint="it may be cut off: download it again"
    )
