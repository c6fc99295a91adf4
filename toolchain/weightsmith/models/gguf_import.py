"""Convert a GGUF file of the llama architecture to a Hugging Face checkpoint."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import ReaderTensor, TokenType, dequantize

from weightsmith.core.errors import InputRefused
from weightsmith.core.values import JsonValue
from weightsmith.models.gguf_reader import GGUFReader
from weightsmith.models.safetensors import build_header

_GLOBAL_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER_NAME = re.compile(r"blk\.(\d+)\.(\w+)\.weight")
_ROWS_PER_BLOCK = 4096
_MOST = 1 << 31
_LARGEST = 3e38
"""Roughly float32's maximum."""


def import_gguf(source: Path, out: Path) -> None:
    """Write the model in `source` as a float16 Hugging Face checkpoint to the folder `out`."""
    reader, facts = _open(source)
    try:
        tensors = {_hugging_face_name(tensor.name): tensor for tensor in reader.tensors}
        sizes, tied = _sizes(facts), "lm_head.weight" not in tensors
        config = _model_config(facts, sizes, tied=tied)
        _check_tensors(sizes, tensors, tied=tied)
        texts = tokenizer_files(facts, config)
    except KeyError as missing:
        raise InputRefused(
            f"{source.name} has no GGUF key {missing}",
            hint="convert the model again with a current llama.cpp",
        ) from None
    texts["config.json"] = json_text(config)
    # The end token and, if set, the end-of-turn token.
    ends = [config["eos_token_id"], _token_id(facts, "eot")]
    ends = [token for token in dict.fromkeys(ends) if token is not None]
    texts["generation_config.json"] = json_text(
        {
            "_from_model_config": True,
            "bos_token_id": config["bos_token_id"],
            "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
            "pad_token_id": config["pad_token_id"],
        }
    )
    out.mkdir(parents=True, exist_ok=True)
    _write_weights(out / "model.safetensors", tensors, sizes["head_dim"])
    for name, text in texts.items():
        (out / name).write_bytes(text.encode())
        (out / name).chmod(0o644)


def _open(source: Path) -> tuple[GGUFReader, Mapping[str, JsonValue]]:
    """Open a GGUF file and return its metadata; raise InputRefused unless it is a valid llama."""
    if not source.is_file():
        raise InputRefused(f"{source} is not a file", hint="give the path of one .gguf file")
    try:
        reader = GGUFReader(source)
        facts = {name: field.contents() for name, field in reader.fields.items()}
    except ValueError as problem:
        raise InputRefused(
            f"{source.name} is not a valid GGUF file: {problem}",
            hint="download the file again and compare its sha256 with the publisher's",
        ) from problem
    architecture = facts.get("general.architecture")
    if architecture != "llama":
        raise InputRefused(
            f"{source.name} has architecture {architecture!r}; only 'llama' can be imported",
            hint="start from the model's original Hugging Face checkpoint instead",
        )
    return reader, facts


def _hugging_face_name(name: str) -> str:
    """Return a GGUF tensor's Hugging Face name; raise InputRefused if Llama has no such tensor."""
    if name in _GLOBAL_TENSORS:
        return _GLOBAL_TENSORS[name]
    match = _LAYER_NAME.fullmatch(name)
    if match is None or match[2] not in _LAYER_TENSORS:
        raise InputRefused(
            f"the GGUF tensor {name!r} does not exist in a plain Llama checkpoint",
            hint="biases, experts and long-context rope factors cannot be imported; "
            "start from the original Hugging Face checkpoint",
        )
    return f"model.layers.{int(match[1])}.{_LAYER_TENSORS[match[2]]}.weight"


def _sizes(facts: Mapping[str, JsonValue]) -> dict[str, int]:
    """Return the sizes from which the tensors' shapes follow, by their keys in config.json.

    Raises InputRefused for an invalid one, and KeyError for a missing one.
    """
    heads = _count_of(facts, "llama.attention.head_count")
    hidden = _count_of(facts, "llama.embedding_length")
    return {
        "num_attention_heads": heads,
        "hidden_size": hidden,
        "intermediate_size": _count_of(facts, "llama.feed_forward_length"),
        "vocab_size": len(_texts_of(facts, "tokenizer.ggml.tokens")),
        "num_hidden_layers": _count_of(facts, "llama.block_count"),
        "num_key_value_heads": _count_of(facts, "llama.attention.head_count_kv", heads),
        "head_dim": _count_of(facts, "llama.attention.key_length", hidden // heads),
    }


def _model_config(
    facts: Mapping[str, JsonValue], sizes: Mapping[str, int], *, tied: bool
) -> dict[str, JsonValue]:
    if facts.get("llama.rope.scaling.type", "none") != "none":
        raise InputRefused(
            f"rope scaling {facts['llama.rope.scaling.type']!r} cannot be imported",
            hint="start from the original Hugging Face checkpoint",
        )
    config: dict[str, JsonValue] = {
        **sizes,
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": _token_id(facts, "bos"),
        "eos_token_id": _token_id(facts, "eos"),
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": _count_of(facts, "llama.context_length"),
        "mlp_bias": False,
        "model_type": "llama",
        "pad_token_id": _token_id(facts, "padding"),
        "rms_norm_eps": _number_of(facts, "llama.attention.layer_norm_rms_epsilon"),
        "rope_scaling": None,
        "rope_theta": _number_of(facts, "llama.rope.freq_base", 10000.0),
        "tie_word_embeddings": tied,
        "torch_dtype": "float16",
        "use_cache": True,
    }
    head = sizes["head_dim"]
    if head % 2:
        raise InputRefused(
            f"the attention head size {head} is odd, but rope needs pairs",
            hint="the file is damaged; convert or download it again",
        )
    if facts.get("llama.rope.dimension_count", head) != head:
        raise InputRefused(
            "rope covers only part of each attention head, which a Llama configuration cannot "
            "express",
            hint="start from the original Hugging Face checkpoint",
        )
    return dict(sorted(config.items()))


def _check_tensors(
    sizes: Mapping[str, int], tensors: Mapping[str, ReaderTensor], *, tied: bool
) -> None:
    if sizes["num_hidden_layers"] > len(tensors):
        raise InputRefused(
            f"{sizes['num_hidden_layers']} layers need more than {len(tensors)} tensors",
            hint="the file is incomplete or was not made from a plain Llama model",
        )
    hidden, inner = sizes["hidden_size"], sizes["intermediate_size"]
    queries = sizes["num_attention_heads"] * sizes["head_dim"]
    keys = sizes["num_key_value_heads"] * sizes["head_dim"]
    layer = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    expected: dict[str, tuple[int, ...]] = {
        f"model.layers.{number}.{part}.weight": sides
        for number in range(sizes["num_hidden_layers"])
        for part, sides in layer.items()
    }
    expected["model.embed_tokens.weight"] = (sizes["vocab_size"], hidden)
    expected["model.norm.weight"] = (hidden,)
    if not tied:
        expected["lm_head.weight"] = (sizes["vocab_size"], hidden)
    found = {name: tuple(int(n) for n in reversed(t.shape)) for name, t in tensors.items()}
    wrong = [
        f"{name} should be {expected.get(name, 'absent')}, but is {found.get(name, 'absent')}"
        for name in sorted(expected.keys() | found.keys())
        if expected.get(name) != found.get(name)
    ]
    if wrong:
        raise InputRefused(
            f"{len(wrong)} tensors do not match the GGUF's configuration: {wrong[0]}",
            hint="the file is incomplete or was not made from a plain Llama model",
        )


def _write_weights(path: Path, tensors: Mapping[str, ReaderTensor], head: int) -> None:
    """Write the tensors in float16, sorted by name, one block of rows at a time."""
    shapes = {name: [int(n) for n in reversed(tensors[name].shape)] for name in sorted(tensors)}
    rows = [(name, "F16", shape) for name, shape in shapes.items()]
    with path.open("wb") as file:
        file.write(build_header(rows, {"format": "pt"}))
        for name in shapes:
            for block in _float16_blocks(name, tensors[name], head):
                file.write(block.tobytes())
    path.chmod(0o644)


def _float16_blocks(
    name: str, tensor: ReaderTensor, head: int
) -> Iterator[npt.NDArray[np.float16]]:
    half = head // 2
    rotated = name.endswith(("q_proj.weight", "k_proj.weight"))
    rows = 2 * half if rotated else _ROWS_PER_BLOCK
    for start in range(0, len(tensor.data), rows):
        try:
            # Overflow is checked below, so suppress numpy's warning.
            with np.errstate(over="ignore"):
                exact = dequantize(tensor.data[start : start + rows], tensor.tensor_type)
                block = exact.astype(np.dtype("<f2"))
        except NotImplementedError:
            raise InputRefused(
                f"{name} has the unsupported type {tensor.tensor_type.name}",
                hint="start from the original Hugging Face checkpoint",
            ) from None
        if not np.isfinite(block).all():
            raise InputRefused(f"{name} overflows float16", hint="start from a bfloat16 checkpoint")
        if rotated:
            # For rope, llama.cpp pairs neighbouring rows of a head; Hugging Face pairs the halves.
            block = block.reshape(half, 2, -1).swapaxes(0, 1).reshape(2 * half, -1)
        yield block


# llama.cpp's name of a pre-tokenizer -> the same split in the tokenizers library.
_DIGITS: dict[str, JsonValue] = {"type": "Digits", "individual_digits": True}
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BYTE_LEVEL: dict[str, JsonValue] = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": True,
}
_LLAMA3_SPLIT: dict[str, JsonValue] = {
    "type": "Split",
    "pattern": {"Regex": _LLAMA3},
    "behavior": "Isolated",
    "invert": False,
}
_PRE_TOKENIZERS: dict[str, list[dict[str, JsonValue]]] = {
    "gpt-2": [_BYTE_LEVEL],
    "smollm": [_DIGITS, _BYTE_LEVEL],
    "llama-bpe": [_LLAMA3_SPLIT, {**_BYTE_LEVEL, "use_regex": False}],
}


def tokenizer_files(
    facts: Mapping[str, JsonValue], config: Mapping[str, JsonValue]
) -> dict[str, str]:
    """Return the tokenizer's files, texts by name, from a GGUF file's metadata and config.json.

    Raises InputRefused for a tokenizer that has no equivalent in the tokenizers library.
    """
    kind, split = facts["tokenizer.ggml.model"], str(facts.get("tokenizer.ggml.pre"))
    if kind != "gpt2" or split not in _PRE_TOKENIZERS:
        raise InputRefused(
            f"the tokenizer {kind!r} with pre-tokenizer {split!r} cannot be imported",
            hint=f"supported: 'gpt2' with {', '.join(sorted(_PRE_TOKENIZERS))}; otherwise start "
            "from the original Hugging Face checkpoint",
        )
    tokens = _texts_of(facts, "tokenizer.ggml.tokens")
    if len(set(tokens)) != len(tokens):
        raise InputRefused(
            "the GGUF vocabulary has duplicate tokens, which tokenizer.json cannot express",
            hint="start from the original Hugging Face checkpoint",
        )
    names = _special_tokens(facts, tokens)
    add_bos = bool(facts.get("tokenizer.ggml.add_bos_token", split == "llama-bpe"))
    types = facts.get("tokenizer.ggml.token_type", [])
    if not isinstance(types, list) or not all(type(item) is int for item in types):
        raise _invalid("tokenizer.ggml.token_type", types)
    added = _added_tokens(tokens, types)
    settings: dict[str, JsonValue] = {
        "add_bos_token": add_bos,
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(token["id"]): {key: token[key] for key in token if key != "id"} for token in added
        },
        "clean_up_tokenization_spaces": False,
        "model_max_length": config["max_position_embeddings"],
        "tokenizer_class": "PreTrainedTokenizerFast",
        **names,
    }
    files = {"special_tokens_map.json": json_text(names)}
    if isinstance(template := facts.get("tokenizer.chat_template"), str) and template:
        # Newer libraries read the file, older engines only the key.
        files["chat_template.jinja"] = settings["chat_template"] = template
    files["tokenizer_config.json"] = json_text(settings)
    bos = _token_id(facts, "bos") if add_bos else None
    files["tokenizer.json"] = json_text(_tokenizer(facts, _PRE_TOKENIZERS[split], added, bos))
    return files


def _special_tokens(facts: Mapping[str, JsonValue], tokens: list[str]) -> dict[str, str]:
    keys = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {name: _token_id(facts, key) for name, key in keys.items()}
    outside = {name: number for name, number in ids.items() if number and number >= len(tokens)}
    if outside:
        raise InputRefused(
            f"special token ids beyond the {len(tokens)} tokens of the vocabulary: {outside}",
            hint="the file is damaged; convert or download it again",
        )
    return {f"{name}_token": tokens[n] for name, n in sorted(ids.items()) if n is not None}


def _added_tokens(tokens: list[str], types: list[int]) -> list[dict[str, JsonValue]]:
    """Return the tokens that are never split: control and user-defined tokens."""
    whole = (TokenType.CONTROL, TokenType.USER_DEFINED)
    return [
        {
            "id": number,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind == TokenType.CONTROL,
        }
        for number, (token, kind) in enumerate(zip(tokens, types, strict=False))
        if kind in whole
    ]


def _tokenizer(
    facts: Mapping[str, JsonValue],
    pre_tokenizers: list[dict[str, JsonValue]],
    added: list[dict[str, JsonValue]],
    bos: int | None,
) -> dict[str, JsonValue]:
    tokens = _texts_of(facts, "tokenizer.ggml.tokens")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": pre_tokenizers},
        "post_processor": {**_BYTE_LEVEL, "trim_offsets": False}
        if bos is None
        else _begin_with(tokens[bos], bos),
        "decoder": _BYTE_LEVEL,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": bool(facts.get("tokenizer.ggml.pre") == "llama-bpe"),
            "vocab": {token: number for number, token in enumerate(tokens)},
            "merges": _texts_of(facts, "tokenizer.ggml.merges"),
        },
    }


def _begin_with(token: str, number: int) -> dict[str, JsonValue]:
    """Return a post-processor that prepends the begin token to each sequence."""
    begin: JsonValue = {"SpecialToken": {"id": token, "type_id": 0}}
    first: JsonValue = {"Sequence": {"id": "A", "type_id": 0}}
    second: JsonValue = {"Sequence": {"id": "B", "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [begin, first],
        "pair": [begin, first, begin, second],
        "special_tokens": {token: {"id": token, "ids": [number], "tokens": [token]}},
    }


def json_text(value: Mapping[str, JsonValue]) -> str:
    """Return a file's text as transformers writes its JSON files."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _count_of(facts: Mapping[str, JsonValue], key: str, default: int | None = None) -> int:
    """Return a count of at least 1; raise InputRefused if invalid, KeyError if missing."""
    value = facts[key] if default is None else facts.get(key, default)
    if type(value) is not int or not 0 < value < _MOST:
        raise _invalid(key, value)
    return value


def _number_of(facts: Mapping[str, JsonValue], key: str, default: float | None = None) -> float:
    """Return a float; raise InputRefused if invalid, KeyError if missing.

    Returns the shortest decimal: GGUF stores 1e-05 as the float32 9.999999747378752e-06.
    """
    value = facts[key] if default is None else facts.get(key, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < _LARGEST:
        raise _invalid(key, value)
    return float(str(np.float32(value)))


def _token_id(facts: Mapping[str, JsonValue], name: str) -> int | None:
    """Return a special token's id, or None; raise InputRefused if invalid."""
    key = f"tokenizer.ggml.{name}_token_id"
    value = facts.get(key)
    if value is not None and (type(value) is not int or not 0 <= value < _MOST):
        raise _invalid(key, value)
    return value


def _texts_of(facts: Mapping[str, JsonValue], key: str) -> list[str]:
    value = facts[key]
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise _invalid(key, value)
    return value


def _invalid(key: str, value: object) -> InputRefused:
    return InputRefused(
        f"the GGUF key {key} has the invalid value {str(value)[:80]!r}",
        hint="the file is damaged; convert or download it again",
    )
