"""Convert the tokenizer in a GGUF file to the files that transformers reads."""

from __future__ import annotations

import json
from collections.abc import Mapping

from gguf import TokenType

from weightsmith.core.errors import InputRefused
from weightsmith.core.values import JsonValue
from weightsmith.models.gguf_facts import numbers_of, texts_of, token_id

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
    tokens = texts_of(facts, "tokenizer.ggml.tokens")
    if len(set(tokens)) != len(tokens):
        raise InputRefused(
            "the GGUF vocabulary has duplicate tokens, which tokenizer.json cannot express",
            hint="start from the original Hugging Face checkpoint",
        )
    names = _special_tokens(facts, tokens)
    add_bos = bool(facts.get("tokenizer.ggml.add_bos_token", split == "llama-bpe"))
    added = _added_tokens(tokens, numbers_of(facts, "tokenizer.ggml.token_type"))
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
    bos = token_id(facts, "bos") if add_bos else None
    files["tokenizer.json"] = json_text(_tokenizer(facts, _PRE_TOKENIZERS[split], added, bos))
    return files


def _special_tokens(facts: Mapping[str, JsonValue], tokens: list[str]) -> dict[str, str]:
    """Return the file's begin, end, unknown and padding tokens."""
    keys = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {name: token_id(facts, key) for name, key in keys.items()}
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
    """Return tokenizer.json for a byte-level BPE vocabulary."""
    tokens = texts_of(facts, "tokenizer.ggml.tokens")
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
            "merges": texts_of(facts, "tokenizer.ggml.merges"),
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
