"""Tokenizers of Llama 2's and Gemma's kind: a SentencePiece model, and transformers' form of it."""

import io
import json
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from transformers import GemmaTokenizer, LlamaTokenizer

from tests.paths import ROOT

TEXT = ROOT / "docs" / "design.md"
TURNS = ["<start_of_turn>", "<end_of_turn>"]


def train(kind: str, size: int = 500) -> SentencePieceProcessor:
    """Return byte pairs of about `size` pieces, learnt from our own documentation."""
    gemma = kind == "gemma"
    numbers = (0, 1, 2, 3) if gemma else (-1, 2, 1, 0)
    model, text = io.BytesIO(), TEXT.read_text("utf-8")
    SentencePieceTrainer.train(
        sentence_iterator=filter(None, text.splitlines()),
        model_writer=model,
        vocab_size=size,
        model_type="bpe",
        byte_fallback=True,
        **dict(zip(("pad_id", "eos_id", "bos_id", "unk_id"), numbers, strict=True)),
        user_defined_symbols=["<mask>", *TURNS] if gemma else [],
        add_dummy_prefix=not gemma,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    return SentencePieceProcessor(model_proto=model.getvalue())


def save(pieces: SentencePieceProcessor, kind: str, folder: Path) -> dict[str, Any]:
    """Write what transformers writes of it, without tokenizer.model; return tokenizer.json."""
    names = [pieces.id_to_piece(number) for number in range(pieces.get_piece_size())]
    ranks = {text: number for number, text in enumerate(names)}
    kinds = ("is_unknown", "is_control", "is_byte")
    special = {n for n in range(len(names)) if any(getattr(pieces, k)(n) for k in kinds)}
    merges = [
        (text[:n], text[n:])
        for number, text in enumerate(names)
        if number not in special and text not in TURNS
        for n in range(1, len(text))
        if text[:n] in ranks and text[n:] in ranks
    ]
    made: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    if kind == "gemma":
        made |= {"pad_token": "<pad>", "mask_token": "<mask>"}
    tokenizer = (GemmaTokenizer if kind == "gemma" else LlamaTokenizer)(
        vocab=ranks, merges=merges, **made
    )
    if kind == "gemma":
        tokenizer.add_tokens(TURNS, special_tokens=True)
    tokenizer.save_pretrained(folder)
    return dict(json.loads((folder / "tokenizer.json").read_text("utf-8")))
