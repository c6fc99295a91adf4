"""The tiny model's tokenizer, for SentencePiece readers and for the tokenizers library."""

from __future__ import annotations

import io
import json
from pathlib import Path

import sentencepiece
from tokenizers import Tokenizer

VOCABULARY = 512
SPECIAL = ["<unk>", "<s>", "<|end|>", "<pad>", "<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def write_tokenizer(sentences: list[str], out: Path) -> None:
    """Train a BPE vocabulary with byte fallback and write all of its files."""
    model = _train(sentences)
    (out / "tokenizer.model").write_bytes(model)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    vocabulary = [pieces.id_to_piece(number) for number in range(VOCABULARY)]
    named = {"bos": "<s>", "eos": "<|end|>", "pad": "<pad>", "unk": "<unk>"}
    names = {f"{key}_token": value for key, value in named.items()}
    added = {str(number): _added(token) for number, token in enumerate(SPECIAL)}
    settings = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
        "tokenizer_class": "PreTrainedTokenizerFast",
        **names,
    }
    _write(out / "tokenizer.json", _tokenizer(vocabulary))
    _write(out / "tokenizer_config.json", settings)
    _write(out / "special_tokens_map.json", names)
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    _compare(pieces, Tokenizer.from_file(str(out / "tokenizer.json")), sentences)


def _train(sentences: list[str]) -> bytes:
    """Train with SentencePiece: llama.cpp recognises such a model without a list of known ones."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=written,
        model_type="bpe",
        vocab_size=VOCABULARY,
        byte_fallback=True,
        split_digits=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        eos_piece="<|end|>",
        pad_id=3,
        control_symbols=SPECIAL[4:],
        num_threads=1,
        minloglevel=1,
    )
    return written.getvalue()


def _added(token: str) -> dict[str, object]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"content": token, **flags, "special": True}


def _tokenizer(vocabulary: list[str]) -> dict[str, object]:
    """Describe the same vocabulary as tokenizer.json does: merges instead of scores."""
    number = {piece: place for place, piece in enumerate(vocabulary)}
    merges = [
        f"{piece[:cut]} {piece[cut:]}"
        for piece in vocabulary[len(SPECIAL) + 256 :]
        for cut in range(1, len(piece))
        if piece[:cut] in number and piece[cut:] in number
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": n, **_added(token)} for n, token in enumerate(SPECIAL)],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": number,
            "merges": merges,
        },
    }


def _compare(
    pieces: sentencepiece.SentencePieceProcessor, tokenizer: Tokenizer, texts: list[str]
) -> None:
    """Make sure that both forms cut the texts alike."""
    for text in [*texts, "Übergröße 東京 12345 🚀\n  two  spaces"]:
        if pieces.encode(text) != tokenizer.encode(text).ids:
            raise SystemExit(f"the two tokenizers differ on {text!r}")


def _write(path: Path, value: dict[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
