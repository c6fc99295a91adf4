"""Check a finished GGUF model: complete, of the requested type, with the chat template."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from weightsmith.core.errors import CheckFailed
from weightsmith.core.safe_parse import TOKENIZER, parse_file
from weightsmith.core.values import Json, JsonValue
from weightsmith.models.safetensors import read_header
from weightsmith.models.templates import own_template
from weightsmith.quantizers.gguf_file import GGUFModel
from weightsmith.quantizers.gguf_types import FILE_TYPES, TENSOR_TYPES

# Architectures whose tensors are converted one to one.
_ONE_TO_ONE = frozenset(
    {
        "gemma", "gemma2", "gemma3", "granite", "llama", "olmo2", "qwen2", "qwen3", "smollm3",
        "starcoder2",
    }
)  # fmt: skip
_COMPUTED = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_NOT_WEIGHTS = ("rotary_emb.inv_freq", "attn.bias", "attn.masked_bias")
_EXPERT = re.compile(r"\.experts\.\d+\.")
_MULTIMODAL = re.compile(
    r"^(mlp|vit\.|vpm\.|siglip2\.|conformer\.|merger\.|resampler\.)|(visual|vision|audio|talker)\."
    r"|(vision|audio)_|(projector|connector)\.|image_newline|patch_(embed|embedding|merger|merge_mlp)"
)
"""Tensors of vision and audio models, which the converter omits
(TextModel.filter_tensors of llama.cpp's conversion/base.py)."""
# Keys that the converter would guess from folder names; gguf.py disables them.
_GUESSED = ("general.basename", "general.finetune", "general.organization", "general.version")
_FLOATS = frozenset({"F32", "F16", "BF16", "F64"})
_PART = 1 << 24
"""Bytes that are checked at a time."""
_UNQUANTIZED_SHARE = 0.01
"""Fraction of weights that may stay in 16 or 32 bits: norms, routers, other small tensors."""


def check_files(
    files: Sequence[Path],
    model: Path,
    format_name: str,
    options: Mapping[str, Json],
    *,
    sees: bool = False,
) -> dict[str, Json]:
    """Return a GGUF model's facts for the report; raises CheckFailed if a check fails.

    A model that `sees` has its vision tower in another file, which is checked by itself.

    Checks: all tensors are inside the file and nothing follows the last; file type; tensor count;
    tokens, merges, special tokens and chat template equal the checkpoint's; scales are finite;
    almost no matrices are left unquantized.
    """
    read = GGUFModel(files)
    architecture = str(read.value("general.architecture"))
    _check_type(read, format_name)
    check_guesses(read)
    names = {t.name for shard in model.glob("*.safetensors") for t in read_header(shard).tensors}
    multimodal = {name for name in names if _MULTIMODAL.search(name)}
    _check_count(read, names - multimodal, architecture)
    tokens = check_tokenizer(read, model)
    template = _check_template(read, model)
    check_finite(read)
    fallbacks = _fallbacks(read, format_name, options.get("tensor_types", {}))
    elements = sum(int(t.n_elements) for t in read.tensors.values())
    stored = sum(int(t.n_bytes) for t in read.tensors.values())
    _check_quantized(read, format_name, elements)
    types = Counter(tensor.tensor_type.name for tensor in read.tensors.values())
    return {
        "file": read.name,
        "files": [path.name for path in read.files],
        "size": sum(path.stat().st_size for path in read.files),
        "architecture": architecture,
        "file_type": format_name,
        "tensors": len(read.tensors),
        "types": dict(sorted(types.items())),
        "tensor_types": {name: t.tensor_type.name for name, t in read.tensors.items()},
        "fallbacks": fallbacks,
        "bits_per_weight": round(stored * 8 / elements, 3),
        "tokens": tokens,
        "chat_template": template,
        "imatrix": read.get("weightsmith.imatrix.digest") or "",
        "warnings": _warnings(
            fallbacks, len(read.tensors), 0 if sees else len(multimodal), template=template
        ),
    }


def _warnings(
    fallbacks: Sequence[Mapping[str, JsonValue]], tensors: int, multimodal: int, *, template: bool
) -> list[str]:
    warnings = []
    if multimodal:
        warnings.append(
            f"the file has only the language model: {multimodal} vision and audio tensors are"
            " omitted, so the server does not accept images or audio"
        )
    if fallbacks:
        warnings.append(
            f"{len(fallbacks)} of {tensors} tensors have a larger type, because their rows are not"
            " a multiple of 256: the file has more bits per weight than its name says"
        )
    if not template:
        warnings.append("the checkpoint has no chat template: the server falls back to ChatML")
    return warnings


def _check_type(read: GGUFModel, format_name: str) -> None:
    found, expected = read.value("general.file_type"), FILE_TYPES[format_name].number
    if found != expected:
        raise CheckFailed(
            f"the file has file type {found}, but {format_name} is {expected}",
            hint="check the quantizer's output",
        )


def check_guesses(read: GGUFModel) -> None:
    """Refuse metadata that depends on where the checkpoint lies."""
    guessed = [key for key in _GUESSED if read.get(key) is not None]
    if guessed:
        raise CheckFailed(
            f"the file has {', '.join(guessed)}, guessed from a folder's name, so its bytes depend"
            " on the path",
            hint="the converter ignored its metadata overrides; check its output",
        )


def _check_count(read: GGUFModel, names: set[str], architecture: str) -> None:
    if architecture not in _ONE_TO_ONE or not names:
        return
    merged = {_EXPERT.sub(".experts.", name) for name in names}
    weights = {name for name in merged if not name.endswith(_NOT_WEIGHTS)}
    written = sum(name not in _COMPUTED for name in read.tensors)
    # A tied head may be stored twice in the checkpoint and once in the file.
    untied = {name for name in weights if not name.endswith("lm_head.weight")}
    if written not in {len(weights), len(untied)}:
        raise CheckFailed(
            f"{read.name} has {written} tensors, but the checkpoint has {len(weights)}",
            hint="the converter dropped or added tensors; check its output",
        )


def _check_template(read: GGUFModel, model: Path) -> bool:
    expected = own_template(model)
    found = read.get("tokenizer.chat_template")
    if expected is not None and found != expected:
        what = "is missing from" if found is None else "differs in"
        raise CheckFailed(
            f"the checkpoint's chat template {what} the file",
            hint="chat prompts would be rendered wrongly; convert it again",
        )
    return found is not None


def _fallbacks(
    read: GGUFModel, format_name: str, overrides: Mapping[str, str]
) -> list[dict[str, JsonValue]]:
    """Return the tensors whose rows are not a multiple of 256, in formats with blocks of 256."""
    if "_k" not in format_name and not format_name.startswith(("iq", "tq")):
        return []
    return [
        {
            "tensor": name,
            "type": tensor.tensor_type.name,
            "reason": f"rows of {int(tensor.shape[0])} weights are not a multiple of 256",
        }
        for name, tensor in read.tensors.items()
        if len(tensor.shape) > 1
        and int(tensor.shape[0]) % 256
        and _block(tensor) < 256
        and not any(re.search(pattern, name) for pattern in overrides)
        and (tensor.tensor_type.name not in _FLOATS or int(tensor.shape[0]) % 32)
    ]


def _check_quantized(read: GGUFModel, format_name: str, elements: int) -> None:
    """Refuse a quantized model with matrices in 16 or 32 bits whose rows fit blocks of 32."""
    if FILE_TYPES[format_name].named_bits >= 16:
        return
    left = {
        name: int(tensor.n_elements)
        for name, tensor in read.tensors.items()
        if len(tensor.shape) > 1
        and tensor.tensor_type.name in _FLOATS
        and int(tensor.shape[0]) % 32 == 0
    }
    if sum(left.values()) > _UNQUANTIZED_SHARE * elements:
        worst = sorted(left, key=lambda name: -left[name])[:3]
        raise CheckFailed(
            f"{read.name}: {len(left)} matrices were left unquantized, such as {', '.join(worst)}",
            hint="check the quantizer's output",
        )


def check_finite(read: GGUFModel) -> None:
    """Refuse scales and float16 weights that are infinite or NaN."""
    for name, tensor in read.tensors.items():
        kind = tensor.tensor_type.name
        if kind == "F16":
            # bfloat16 weights beyond float16's range silently become infinite.
            if any(map(_has_infinities, _parts(read, tensor.data.reshape(-1)))):
                raise CheckFailed(
                    f"{read.name}: {name} overflows float16",
                    hint="use q8_0, or another format with scales",
                )
            continue
        row = TENSOR_TYPES.get(kind.lower())
        if row is None or not row.scales:
            continue
        for blocks in _parts(read, tensor.data.reshape(-1, _block_bytes(tensor))):
            if any(_has_infinities(blocks[:, at : at + 2].copy()) for at in row.scales):
                raise CheckFailed(
                    f"{read.name}: {name} ({kind}) has NaN or infinite scales",
                    hint="check the merged weights for outliers; quantize again",
                )


def _parts(read: GGUFModel, data: Any) -> Iterator[Any]:
    """Yield parts of a mapped array; the pages of each count as memory only while it is used."""
    step = max(1, _PART // data[0].nbytes) if len(data) else 1
    for start in range(0, len(data), step):
        yield data[start : start + step]
        read.forget_pages()


def _block(tensor: Any) -> int:
    """Return a tensor's block size; 256, the largest, for unknown types."""
    row = TENSOR_TYPES.get(tensor.tensor_type.name.lower())
    return row.block if row else 256


def _block_bytes(tensor: Any) -> int:
    import gguf

    return int(gguf.GGML_QUANT_SIZES[tensor.tensor_type][1])


def _has_infinities(data: Any) -> bool:
    import numpy as np

    bits = np.asarray(data).view(np.uint16)
    return bool(((bits & 0x7C00) == 0x7C00).any())


_HINT = "text would be tokenized differently than in training; convert it again"
_SPECIAL = {"bos_token_id": "bos", "eos_token_id": "eos"}


def check_tokenizer(read: GGUFModel, model: Path) -> int:
    """Return the number of tokens; raise CheckFailed if the tokenizers differ.

    Compares every token and the number of merges with `tokenizer.json`, if there is one, and begin
    and end token with `config.json`. Added tokens may be written with spaces.
    """
    tokens = read.get("tokenizer.ggml.tokens") or []
    embedding = read.tensors.get("token_embd.weight")
    rows = len(tokens) if embedding is None else int(embedding.shape[1])
    if not tokens or len(tokens) != rows:
        raise CheckFailed(
            f"the file has {len(tokens)} tokens but {rows} embedding rows",
            hint="check the checkpoint's tokenizer files",
        )
    tokenizer = _read(model / "tokenizer.json")
    if tokenizer:
        _check_tokens(tokens, tokenizer)
        _check_merges(read, tokenizer)
    _check_special(read, _read(model / "config.json"), len(tokens))
    return len(tokens)


def _check_tokens(tokens: list[str], tokenizer: Mapping[str, Json]) -> None:
    vocabulary = tokenizer.get("model", {}).get("vocab", {})
    if isinstance(vocabulary, list):  # Unigram: pairs of token and score
        vocabulary = {pair[0]: number for number, pair in enumerate(vocabulary)}
    added = {int(t["id"]): str(t["content"]) for t in tokenizer.get("added_tokens", ())}
    for text, number in vocabulary.items():
        if number in added or number >= len(tokens):
            continue
        if tokens[number] != text:
            raise CheckFailed(
                f"token {number} is {tokens[number]!r} in the file, but {text!r} in tokenizer.json",
                hint=_HINT,
            )
    for number, text in added.items():
        if number < len(tokens) and tokens[number].replace("▁", " ") != text.replace("▁", " "):
            raise CheckFailed(
                f"the added token {number} is {tokens[number]!r} in the file, but {text!r} in "
                "tokenizer.json",
                hint=_HINT,
            )


def _check_merges(read: GGUFModel, tokenizer: Mapping[str, Json]) -> None:
    merges, found = tokenizer.get("model", {}).get("merges"), read.get("tokenizer.ggml.merges")
    # A SentencePiece vocabulary has scores instead of merges.
    if merges and found is not None and len(found) != len(merges):
        raise CheckFailed(
            f"the file has {len(found)} merges, but tokenizer.json {len(merges)}", hint=_HINT
        )


def _check_special(read: GGUFModel, config: Mapping[str, Json], tokens: int) -> None:
    for key, name in _SPECIAL.items():
        expected, found = config.get(key), read.get(f"tokenizer.ggml.{name}_token_id")
        expected = expected if isinstance(expected, list) else [expected]
        if found is not None and not 0 <= int(found) < tokens:
            raise CheckFailed(
                f"the file's {name} token {found} is outside its vocabulary",
                hint="check the checkpoint's config.json and tokenizer files",
            )
        if found is None and None not in expected and name == "eos":
            raise CheckFailed(f"the file does not have the checkpoint's {key}", hint=_HINT)


def _read(path: Path) -> Mapping[str, Json]:
    try:
        data = parse_file(path, largest=TOKENIZER)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CheckFailed(f"cannot read {path.name}: {error}", hint=_HINT) from None
    return data if isinstance(data, dict) else {}
