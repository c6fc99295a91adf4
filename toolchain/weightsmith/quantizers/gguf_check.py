"""Re-reads a finished GGUF model: whether it is whole, what was asked, and able to chat."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from weightsmith.checkpoints.safetensors import read_header
from weightsmith.errors import CheckFailed
from weightsmith.foreign import read_json
from weightsmith.quantizers.gguf_file import GGUFModel
from weightsmith.quantizers.gguf_tokens import check_tokenizer
from weightsmith.quantizers.gguf_types import FILE_TYPES, TENSOR_TYPES
from weightsmith.values import Json

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
_OTHER_SENSES = re.compile(
    r"^(mlp|vit\.|vpm\.|siglip2\.|conformer\.|merger\.|resampler\.)|(visual|vision|audio|talker)\."
    r"|(vision|audio)_|projector\.|image_newline|patch_(embed|embedding|merger|merge_mlp)"
)
"""Tensors of what sees and hears, which the converter keeps for a file of their own
(TextModel.filter_tensors of llama.cpp's conversion/base.py)."""
# What the converter would guess from folder names; gguf.py switches it off.
_GUESSED = ("general.basename", "general.finetune", "general.organization", "general.version")
_FLOATS = frozenset({"F32", "F16", "BF16", "F64"})
_UNQUANTIZED_SHARE = 0.01
"""Share of the weights that may stay in 16 or 32 bits: norms, routers and other small tensors."""


def check_files(
    files: Sequence[Path], model: Path, format_name: str, options: Mapping[str, Json]
) -> dict[str, Json]:
    """Return what the report says of a GGUF model; raises CheckFailed if anything is off.

    Checked: every tensor lies inside its file and nothing follows the last; the file type; the
    tensor count against the checkpoint's; tokens, merges and special tokens against the
    checkpoint's tokenizer, and its chat template; that scales are finite; that next to nothing
    stayed in 16 bits that should not; the size.
    """
    read = GGUFModel(files)
    architecture = str(read.value("general.architecture"))
    _check_type(read, format_name)
    _check_guesses(read)
    names = _checkpoint_tensors(model)
    senses = {name for name in names if _OTHER_SENSES.search(name)}
    _check_count(read, names - senses, architecture)
    tokens = check_tokenizer(read, model)
    template = _check_template(read, model)
    _check_finite(read)
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
        "warnings": _warnings(fallbacks, len(read.tensors), len(senses), template=template),
    }


def _warnings(
    fallbacks: Sequence[Mapping[str, Json]], tensors: int, senses: int, *, template: bool
) -> list[str]:
    warnings = []
    if senses:
        warnings.append(
            f"the file holds the language model alone: {senses} tensors that see or hear are left"
            " out, and the server reads no images or sound"
        )
    if fallbacks:
        warnings.append(
            f"{len(fallbacks)} of {tensors} tensors have rows that are not a multiple of 256 and"
            " took a larger type: the file is bigger than its name says"
        )
    if not template:
        warnings.append("the checkpoint has no chat template: the server falls back to ChatML")
    return warnings


def _check_type(read: GGUFModel, format_name: str) -> None:
    found, wanted = read.value("general.file_type"), FILE_TYPES[format_name].number
    if found != wanted:
        raise CheckFailed(
            f"the file says file type {found}, {format_name} is {wanted}",
            hint="the quantizer did something else than asked; look at its output",
        )


def _check_guesses(read: GGUFModel) -> None:
    guessed = [key for key in _GUESSED if read.get(key) is not None]
    if guessed:
        raise CheckFailed(
            f"the file holds {', '.join(guessed)}, guessed from a folder's name: the same"
            " checkpoint would give other bytes elsewhere",
            hint="the converter did not read its metadata overrides; look at its output",
        )


def _check_count(read: GGUFModel, names: set[str], architecture: str) -> None:
    if architecture not in _ONE_TO_ONE or not names:
        return
    merged = {_EXPERT.sub(".experts.", name) for name in names}
    weights = {name for name in merged if not name.endswith(_NOT_WEIGHTS)}
    written = sum(name not in _COMPUTED for name in read.tensors)
    # A tied output may be stored twice in the checkpoint and once in the file.
    untied = {name for name in weights if not name.endswith("lm_head.weight")}
    if written not in {len(weights), len(untied)}:
        raise CheckFailed(
            f"{read.name} holds {written} tensors, the checkpoint {len(weights)}",
            hint="the converter left some out or made some up; look at its output",
        )


def _checkpoint_tensors(model: Path) -> set[str]:
    names: set[str] = set()
    for shard in sorted(model.glob("*.safetensors")):
        names.update(tensor.name for tensor in read_header(shard).tensors)
    return names


def _check_template(read: GGUFModel, model: Path) -> bool:
    expected = _chat_template(model)
    found = read.get("tokenizer.chat_template")
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
    template = read_json(config).get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _fallbacks(
    read: GGUFModel, format_name: str, overrides: Mapping[str, str]
) -> list[dict[str, Json]]:
    """Return the tensors whose rows no block of 256 fits, in a format that has such blocks."""
    if "_k" not in format_name and not format_name.startswith(("iq", "tq")):
        return []
    return [
        {
            "tensor": name,
            "type": tensor.tensor_type.name,
            "reason": f"rows of {int(tensor.shape[0])} weights are no multiple of 256",
        }
        for name, tensor in read.tensors.items()
        if len(tensor.shape) > 1
        and int(tensor.shape[0]) % 256
        and _block(tensor) < 256
        and not any(re.search(pattern, name) for pattern in overrides)
        and (tensor.tensor_type.name not in _FLOATS or int(tensor.shape[0]) % 32)
    ]


def _check_quantized(read: GGUFModel, format_name: str, elements: int) -> None:
    """Refuse a quantized model with matrices in 16 or 32 bits that blocks of 32 would fit."""
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
            hint="the quantizer skipped them; look at its output",
        )


def _check_finite(read: GGUFModel) -> None:
    """Refuse scales and float16 weights that are infinite or not a number."""
    for name, tensor in read.tensors.items():
        kind = tensor.tensor_type.name
        if kind == "F16":
            # bfloat16 reaches further than float16: a large weight becomes an infinity, silently.
            if _has_infinities(tensor.data):
                raise CheckFailed(
                    f"{read.name}: {name} has weights beyond float16's range",
                    hint="choose q8_0, or a format with its own scales",
                )
            continue
        row = TENSOR_TYPES.get(kind.lower())
        for offset in row.scales if row else ():
            blocks = tensor.data.reshape(-1, _block_bytes(tensor))
            if _has_infinities(blocks[:, offset : offset + 2].copy()):
                raise CheckFailed(
                    f"{read.name}: {name} ({kind}) has scales that are no finite numbers",
                    hint="check the merged weights for outliers; quantize again",
                )


def _block(tensor: Any) -> int:
    """Return the weights in a block of a tensor; of types that we do not know, the most."""
    row = TENSOR_TYPES.get(tensor.tensor_type.name.lower())
    return row.block if row else 256


def _block_bytes(tensor: Any) -> int:
    import gguf

    return int(gguf.GGML_QUANT_SIZES[tensor.tensor_type][1])


def _has_infinities(data: Any) -> bool:
    import numpy as np

    bits = np.asarray(data).view(np.uint16)
    return bool(((bits & 0x7C00) == 0x7C00).any())
