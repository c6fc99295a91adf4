"""How llama.cpp splits a tokenizer's texts, and which tokenizers it cannot know.

llama.cpp has names for pre-tokenizers. Its converter finds the name by a hash of one text's tokens,
so it knows published vocabularies alone; ours are named by the pre-tokenizer in tokenizer.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weightsmith.core.errors import InputRefused
from weightsmith.core.safe_parse import TOKENIZER, parse_file
from weightsmith.models.facts import ModelFacts
from weightsmith.quantizers.architectures import LLAMAS

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_BY_EXPRESSION = {
    _WORDS + r"\p{N}" + _REST: "qwen2",
    # llama-bpe also implies `ignore_merges` and a begin token; smaug-bpe only the split.
    _WORDS + r"\p{N}{1,3}" + _REST: "smaug-bpe",
}
"""Regex of a Split before ByteLevel -> llama.cpp's name (src/llama-vocab.cpp)."""
_BYTES = {"type": "ByteLevel", "add_prefix_space": False}
_BY_HASH = LLAMAS | {"MixtralForCausalLM", "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM"}
"""Architectures whose converters find the name of every byte-pair vocabulary by that hash."""
_SMALLEST_KNOWN = 8192
"""Tokens: all vocabularies whose hashes the converter has are larger."""
_LARGEST_FILE = 4 << 20
"""Bytes of a tokenizer.json; one of so few tokens has less."""


def split_name(tokenizer: Mapping[str, Any]) -> str:
    """Return llama.cpp's name of a tokenizer.json's pre-tokenizer; empty without an exact match."""
    model, normalizer = tokenizer.get("model") or {}, tokenizer.get("normalizer")
    if model.get("type") == "WordPiece":
        return _words_name(model, normalizer or {}, tokenizer.get("pre_tokenizer") or {})
    odd = ("ignore_merges", "byte_fallback", "continuing_subword_prefix", "end_of_word_suffix")
    if model.get("type") != "BPE" or any(model.get(name) for name in odd):
        return ""
    if normalizer and normalizer.get("type") != "NFC":  # llama.cpp leaves NFC to its callers
        return ""
    whole = tokenizer.get("pre_tokenizer") or {}
    steps = whole.get("pretokenizers", []) if whole.get("type") == "Sequence" else [whole]
    *before, last = steps or [{}]
    if any(last.get(key) != value for key, value in _BYTES.items()):
        return ""
    by_words = last.get("use_regex", True)  # GPT-2's expression
    match before:
        case [] if by_words:
            return "gpt-2"
        case [{"type": "Digits", "individual_digits": True}] if by_words:
            return "smollm"
        case [{"type": "Split", "behavior": "Isolated", "pattern": {"Regex": str(found)}} as split]:
            return "" if by_words or split.get("invert") else _BY_EXPRESSION.get(found, "")
        case _:
            return ""


def _words_name(
    model: Mapping[str, Any], normalizer: Mapping[str, Any], splits: Mapping[str, Any]
) -> str:
    """Return the name for BERT's word pieces; the file says apart whether case and accents count.

    llm_tokenizer_wpm (src/llama-vocab.cpp) splits as BERT does, whatever the name.
    """
    kinds = normalizer.get("type"), splits.get("type"), model.get("continuing_subword_prefix")
    cleaned = normalizer.get("clean_text") and normalizer.get("handle_chinese_chars")
    return "bert-bge" if kinds == ("BertNormalizer", "BertPreTokenizer", "##") and cleaned else ""


def unknown_split() -> InputRefused:
    """Return the refusal of a tokenizer whose way to split texts llama.cpp does not have."""
    return InputRefused(
        "llama.cpp does not know how tokenizer.json splits texts (its pre-tokenizer), and would cut"
        " them otherwise than in training",
        hint="choose target vllm, or a model with a published tokenizer",
    )


def check_tokenizer(folder: Path, model: ModelFacts) -> None:
    """Raise InputRefused for a tokenizer that the converter cannot know, by its files alone.

    It refuses others itself: whether it has the hash of a large vocabulary is seen when it runs.
    """
    path = folder / "tokenizer.json"
    if model.text_architecture not in _BY_HASH or (folder / "tokenizer.model").exists():
        return
    if not path.is_file() or path.stat().st_size > _LARGEST_FILE:
        return
    try:
        tokenizer = parse_file(path, largest=TOKENIZER)
    except ValueError:
        return  # what reads it says so
    kind = tokenizer.get("model") if isinstance(tokenizer, dict) else None
    if not isinstance(kind, dict) or kind.get("type") != "BPE" or kind.get("byte_fallback"):
        return
    vocabulary = kind.get("vocab")
    small = isinstance(vocabulary, dict) and len(vocabulary) < _SMALLEST_KNOWN
    if small and not split_name(tokenizer):
        raise unknown_split()
