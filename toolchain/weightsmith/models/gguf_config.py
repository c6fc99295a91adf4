"""A GGUF model's shape as keys of config.json; which files of a folder are the model.

It is in one file or in parts, named `NAME-00001-of-00003.gguf` and so on, as in llama.cpp, and may
have a projector for pictures.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from weightsmith.core.errors import InputRefused
from weightsmith.core.values import JsonValue
from weightsmith.models.folder import check_links, check_template
from weightsmith.models.task import NO_SENTENCES, SentenceTransformers

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
    "pooling_type": "pooling_type",
    "classifier.output_labels": "output_labels",
}
"""GGUF keys below the architecture's name: https://github.com/ggml-org/ggml docs/gguf.md."""
_POOLING = {1: "mean", 2: "cls", 3: "lasttoken"}
"""enum llama_pooling_type (include/llama.h) -> sentence-transformers' name."""
_HEADS = {
    ("bert", True): "Bert",
    ("bert", False): "XLMRoberta",
    ("modern-bert", False): "ModernBert",
    ("modern-bert", True): "ModernBert",
}
"""GGUF architecture, and whether the texts of a pair have types -> transformers' name."""
_PREFIX = "mmproj"
"""By this, llama.cpp finds projectors, too (common/download.cpp)."""
_SUFFIX = ".gguf"
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)


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
    labels = config.pop("output_labels", None)
    if isinstance(labels, list) and labels:
        kinds = fields.get("tokenizer.ggml.token_type_count")
        typed = kinds is not None and _contents(path, kinds) != 1
        name = _HEADS.get((architecture, typed), architecture)
        config["architectures"] = [f"{name}ForSequenceClassification"]
        # Its server gives the first score alone.
        config["id2label"] = {"0": str(labels[0])}
    if "vocab_size" not in config and (tokens := fields.get("tokenizer.ggml.tokens")):
        config["vocab_size"] = len(tokens.data)
    return config


def gguf_pooling(config: Mapping[str, JsonValue]) -> SentenceTransformers:
    """Return how a file's vectors are made, if it says so and has no labels."""
    found = config.get("pooling_type")
    mode = _POOLING.get(found, "") if isinstance(found, int) and "id2label" not in config else ""
    if not mode:
        return NO_SENTENCES
    return SentenceTransformers(modules=("Transformer", "Pooling"), pooling=mode)


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


def check_gguf_templates(path: Path) -> None:
    """Raise InputRefused if a chat template in a GGUF file reaches into Python, or for damage.

    There may be several, as `tokenizer.chat_template.NAME`: ggml's docs/gguf.md.
    """
    for key, field in _reader(path).fields.items():
        if key.startswith("tokenizer.chat_template"):
            check_template(str(_contents(path, field)), path)


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


def projector_name(model: str) -> str:
    """Return the name of the projector beside a model's file, which may be a part."""
    path = PurePosixPath(model)
    return str(path.with_name(f"{_PREFIX}-{model_name(path.name)}{_SUFFIX}"))


def projector_of(names: Iterable[str]) -> str:
    """Return the projector among a model's files, by relative path; empty if there is none.

    Without one that is named after the model's file, it is the only one with the prefix.
    """
    known = _gguf(names)
    if named := next((name for name in map(projector_name, known) if name in known), ""):
        return named
    prefixed = [name for name in known if PurePosixPath(name).name.startswith(_PREFIX)]
    return prefixed[0] if len(prefixed) == 1 < len(known) else ""


def gguf_models(names: Iterable[str]) -> list[str]:
    """Return the GGUF files among these, sorted, but for a projector."""
    known = _gguf(names)
    projector = projector_of(known)
    return [name for name in known if name != projector]


def files_with(path: Path) -> tuple[str, ...]:
    """Return the names of a GGUF model's parts, and of the projector beside them if there is one.

    `path` is the file of a whole model, or of any part. Raises InputRefused if a part is missing,
    or if one of the files beside `path` is a link out of its folder.
    """
    names, projector = parts_of(path.name), projector_name(path.name)
    if lost := [part for part in names if not (path.parent / part).is_file()]:
        raise InputRefused(
            f"{path} is one of {len(names)} parts, and {lost[0]} is not beside it",
            hint="give a model whose parts are all in its folder",
        )
    names = (*names, projector) if (path.parent / projector).is_file() else names
    check_links(path.parent, (name for name in names if name != path.name))
    return names


def _gguf(names: Iterable[str]) -> list[str]:
    return sorted(name for name in names if name.endswith(_SUFFIX))


def parts_of(name: str) -> tuple[str, ...]:
    """Return all files of the model that a GGUF file belongs to, in order: itself if it is whole.

    A server opens the first one, and finds the others beside it.
    """
    found = _PART.fullmatch(name)
    if not found or not 0 < int(found[2]) <= int(found[3]):
        return (name,)
    return tuple(f"{found[1]}-{n:05}-of-{found[3]}.gguf" for n in range(1, int(found[3]) + 1))


def model_name(name: str) -> str:
    """Return a GGUF file's name without its ending and its part's number."""
    found = _PART.fullmatch(name)
    return found[1] if found else name.removesuffix(".gguf")
