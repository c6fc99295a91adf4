"""Re-reads a finished GGUF file: whether it is whole, what was asked, and able to chat."""

from __future__ import annotations

import json
import re
import struct
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from toolchain.errors import CheckFailed
from toolchain.values import Json

# llama.h's llama_ftype.
_FILE_TYPES = {"f16": 1, "q8_0": 7, "q4_k_m": 15, "q5_k_m": 17}
# What a K-quant takes for a matrix whose rows are not a multiple of 256 (llama-quant.cpp).
_FALLBACKS = frozenset({"Q4_0", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "F16", "BF16"})
# Architectures where one tensor of the checkpoint becomes one of the file.
_ONE_TO_ONE = frozenset(
    {
        "gemma", "gemma2", "gemma3", "granite", "llama", "olmo2", "qwen2", "qwen3", "smollm3",
        "starcoder2",
    }
)  # fmt: skip
_COMPUTED = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_NOT_WEIGHTS = ("rotary_emb.inv_freq", "attn.bias", "attn.masked_bias")
_EXPERT = re.compile(r"\.experts\.\d+\.")
# What the converter would guess from folder names; gguf.py switches it off.
_GUESSED = ("general.basename", "general.finetune", "general.organization", "general.version")
_MAX_HEADER = 100_000_000


def check_file(path: Path, model: Path, format_name: str) -> Mapping[str, Json]:
    """Return what the report says of a GGUF file; raises CheckFailed if anything is off.

    Checked: every tensor lies inside the file and nothing follows the last; the file type; the
    tensor count against the checkpoint's; tokens against the embedding; the chat template
    against the checkpoint's; float16 overflow.
    """
    reader = _open(path)
    facts = _Facts(reader, path)
    architecture = str(facts.value("general.architecture"))
    _check_size(reader, path)
    _check_type(facts, format_name)
    _check_guesses(facts)
    _check_count(reader, model, architecture, path)
    tokens = _check_tokens(reader, facts)
    template = _check_template(facts, model)
    if format_name == "f16":
        _check_finite(reader, path)
    types = Counter(tensor.tensor_type.name for tensor in reader.tensors)
    elements = sum(int(tensor.n_elements) for tensor in reader.tensors)
    stored = sum(int(tensor.n_bytes) for tensor in reader.tensors)
    fallbacks = sum(types[kind] for kind in _FALLBACKS) if "_k_" in format_name else 0
    return {
        "file": path.name,
        "size": path.stat().st_size,
        "architecture": architecture,
        "file_type": format_name,
        "tensors": len(reader.tensors),
        "types": dict(sorted(types.items())),
        "fallbacks": fallbacks,
        "bits_per_weight": round(stored * 8 / elements, 3),
        "tokens": tokens,
        "chat_template": template,
        "warnings": _warnings(fallbacks, len(reader.tensors), template=template),
    }


def _warnings(fallbacks: int, tensors: int, *, template: bool) -> list[str]:
    warnings = []
    if fallbacks:
        warnings.append(
            f"{fallbacks} of {tensors} tensors have rows that are not a multiple of 256 and took"
            " a larger type: the file is bigger than its name says"
        )
    if not template:
        warnings.append("the checkpoint has no chat template: the server falls back to ChatML")
    return warnings


class _Facts:
    """The file's key-value entries, with an error that names what is missing."""

    def __init__(self, reader: Any, path: Path) -> None:
        self._reader = reader
        self._path = path

    def value(self, key: str) -> Json:
        value = self.get(key)
        if value is None:
            raise CheckFailed(f"{self._path.name} lacks {key}", hint="convert it again")
        return value

    def get(self, key: str) -> Json:
        field = self._reader.fields.get(key)
        return None if field is None else field.contents()

    def length(self, key: str) -> int:
        field = self._reader.fields.get(key)
        return 0 if field is None else len(field.data)


def _open(path: Path) -> Any:
    import gguf  # here, so that listing the formats stays light

    try:
        return gguf.GGUFReader(path)
    except (OSError, ValueError, IndexError, KeyError, struct.error) as error:
        raise CheckFailed(
            f"{path.name} is not a whole GGUF file: {error}",
            hint="make it again; a full disk is a common cause",
        ) from None


def _check_size(reader: Any, path: Path) -> None:
    last = max(reader.tensors, key=lambda tensor: int(tensor.data_offset), default=None)
    if last is None:
        raise CheckFailed(f"{path.name} holds no tensors", hint="convert it again")
    end = int(last.data_offset) + int(last.n_bytes)
    padded = -(-end // reader.alignment) * reader.alignment
    size = path.stat().st_size
    if size not in {end, padded}:
        raise CheckFailed(
            f"{path.name} has {size} bytes, its tensors end at {padded}",
            hint="make it again; a full disk is a common cause",
        )


def _check_type(facts: _Facts, format_name: str) -> None:
    found, wanted = facts.value("general.file_type"), _FILE_TYPES[format_name]
    if found != wanted:
        raise CheckFailed(
            f"the file says file type {found}, {format_name} is {wanted}",
            hint="the quantizer did something else than asked; look at its output",
        )


def _check_guesses(facts: _Facts) -> None:
    guessed = [key for key in _GUESSED if facts.get(key) is not None]
    if guessed:
        raise CheckFailed(
            f"the file holds {', '.join(guessed)}, guessed from a folder's name: the same"
            " checkpoint would give other bytes elsewhere",
            hint="the converter did not read its metadata overrides; look at its output",
        )


def _check_count(reader: Any, model: Path, architecture: str, path: Path) -> None:
    names = _checkpoint_tensors(model)
    if architecture not in _ONE_TO_ONE or not names:
        return
    merged = {_EXPERT.sub(".experts.", name) for name in names}
    weights = {name for name in merged if not name.endswith(_NOT_WEIGHTS)}
    written = sum(tensor.name not in _COMPUTED for tensor in reader.tensors)
    # A tied output may be stored twice in the checkpoint and once in the file.
    if written not in {len(weights), len(weights - {"lm_head.weight"})}:
        raise CheckFailed(
            f"{path.name} holds {written} tensors, the checkpoint {len(weights)}",
            hint="the converter left some out or made some up; look at its output",
        )


def _checkpoint_tensors(model: Path) -> set[str]:
    names: set[str] = set()
    for shard in sorted(model.glob("*.safetensors")):
        with shard.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > _MAX_HEADER:
                raise CheckFailed(f"{shard.name} has a header of {length} bytes")
            names.update(json.loads(stream.read(length)))
    return names - {"__metadata__"}


def _check_tokens(reader: Any, facts: _Facts) -> int:
    tokens = facts.length("tokenizer.ggml.tokens")
    rows = next((int(t.shape[1]) for t in reader.tensors if t.name == "token_embd.weight"), tokens)
    if not tokens or tokens != rows:
        raise CheckFailed(
            f"the file has {tokens} tokens and {rows} embedding rows",
            hint="check the checkpoint's tokenizer files",
        )
    return tokens


def _check_template(facts: _Facts, model: Path) -> bool:
    expected = _chat_template(model)
    found = facts.get("tokenizer.chat_template")
    if expected is not None and found != expected:
        what = "lacks" if found is None else "has another chat template than"
        raise CheckFailed(
            f"the file {what} the checkpoint's chat template",
            hint="chat requests would be worded wrongly; convert it again",
        )
    return found is not None


def _chat_template(model: Path) -> str | None:
    """Return the checkpoint's default template; a file of its own wins, as in transformers."""
    own = model / "chat_template.jinja"
    if own.is_file():
        return own.read_text("utf-8")
    config = model / "tokenizer_config.json"
    if not config.is_file():
        return None
    template = json.loads(config.read_text("utf-8")).get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _check_finite(reader: Any, path: Path) -> None:
    import numpy as np

    # bfloat16 reaches further than float16: a large weight becomes an infinity, silently.
    for tensor in reader.tensors:
        if tensor.tensor_type.name != "F16":
            continue
        bits = np.asarray(tensor.data).view(np.uint16)
        if bool(((bits & 0x7C00) == 0x7C00).any()):
            raise CheckFailed(
                f"{path.name}: {tensor.name} has weights beyond float16's range",
                hint="choose q8_0, or a format with its own scales",
            )
