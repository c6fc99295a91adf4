"""SentencePiece files for llama.cpp's converter, out of a tokenizer.json that came without them.

Tokenizers of Llama 2's, Mistral's and Gemma's kind are SentencePiece models, of which transformers
writes tokenizer.json alone, as beside an adapter. The converter then refuses, or gives all pieces
one score, with which llama.cpp joins other pieces than in training; and it knows the added tokens
from tokenizer_config.json alone, where they no longer stand.

Runs in a builder, by its path: it imports nothing of ours.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

SPACE = "▁"
_MODEL, _TOKENIZER, _CONFIG = "tokenizer.model", "tokenizer.json", "tokenizer_config.json"
_UNKNOWN = "<unk>"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


@contextmanager
def with_pieces(model: Path) -> Iterator[Path]:
    """Yield a folder that is the model's, with what the converter misses of its tokenizer.

    The model's own where nothing lacks. Raises NotImplementedError for byte pairs with bytes as
    pieces that are no SentencePiece model: llama.cpp has nothing that joins them.
    """
    files = _missing(model)
    if not files:
        yield model
        return
    with TemporaryDirectory(prefix="pieces-") as folder:
        view = Path(folder) / model.name
        view.mkdir()
        for path in model.iterdir():
            if path.name not in files:
                (view / path.name).symlink_to(path)
        for name, data in files.items():
            (view / name).write_bytes(data)
        yield view


def _missing(model: Path) -> dict[str, bytes]:
    tokenizer = _read(model / _TOKENIZER)
    files = {}
    if not (model / _MODEL).exists():
        if not _has_byte_pieces(tokenizer):
            return {}
        files[_MODEL] = sentence_pieces(tokenizer)
    config = _read(model / _CONFIG)
    if tokenizer and "added_tokens_decoder" not in config:
        added = {str(token["id"]): token for token in tokenizer.get("added_tokens", ())}
        files[_CONFIG] = json.dumps({**config, "added_tokens_decoder": added}).encode()
    return files


def sentence_pieces(tokenizer: Mapping[str, Any]) -> bytes:
    """Return the SentencePiece model that a tokenizer.json was made from, but for its scores.

    SentencePiece joins the neighbours whose piece has the highest score, tokenizer.json those whose
    merge comes first; so minus a merge's place is a score that joins the same
    (https://github.com/google/sentencepiece, src/bpe_model.cc). Raises NotImplementedError where
    that does not hold: a piece that two others make is made by no merge.
    """
    pb: Any = importlib.import_module("sentencepiece.sentencepiece_model_pb2")
    vocabulary: dict[str, int] = tokenizer["model"]["vocab"]
    special = {t["content"] for t in tokenizer.get("added_tokens", ()) if t.get("special")}
    added = {t["content"] for t in tokenizer.get("added_tokens", ())}
    unknown = tokenizer["model"].get("unk_token") or _UNKNOWN
    places = _places(tokenizer["model"], added)
    if unknown not in vocabulary:
        raise NotImplementedError("byte pairs that are no SentencePiece model: no unknown token")
    kinds, made = pb.ModelProto.SentencePiece, pb.ModelProto()
    texts = {number: text for text, number in vocabulary.items()}
    for number in range(max(texts) + 1):
        text = texts.get(number, f"[unused{number}]")
        kind = kinds.NORMAL
        if number not in texts:
            kind = kinds.UNUSED
        elif text == unknown:
            kind = kinds.UNKNOWN
        elif _BYTE.fullmatch(text):
            kind = kinds.BYTE
        elif text in special:
            kind = kinds.CONTROL
        elif text in added:
            kind = kinds.USER_DEFINED
        # Single characters come after all that is joined, as SentencePiece's trainer writes them.
        score = float(-places.get(text, len(places) + number))
        made.pieces.add(piece=text, score=score if kind == kinds.NORMAL else 0.0, type=kind)
    made.trainer_spec.model_type = pb.TrainerSpec.BPE
    made.trainer_spec.vocab_size = len(made.pieces)
    made.trainer_spec.byte_fallback = True
    made.trainer_spec.unk_id = vocabulary[unknown]
    made.trainer_spec.unk_piece = unknown
    made.normalizer_spec.name = "identity"
    made.normalizer_spec.add_dummy_prefix = starts_with_space(tokenizer)
    made.normalizer_spec.remove_extra_whitespaces = False
    return bytes(made.SerializeToString(deterministic=True))


def starts_with_space(tokenizer: Mapping[str, Any]) -> bool:
    """Say whether a space is put before a text."""
    for step in (*_steps(tokenizer, "normalizer"), *_steps(tokenizer, "pre_tokenizer")):
        if step.get("type") == "Prepend":
            return True
        if step.get("type") == "Metaspace":
            return bool(step.get("prepend_scheme", "always") != "never")
    return False


def _has_byte_pieces(tokenizer: Mapping[str, Any]) -> bool:
    """Say whether this is byte pairs of characters, with bytes as pieces for unknown ones."""
    model = tokenizer.get("model") or {}
    return bool(model.get("type") == "BPE" and model.get("byte_fallback"))


def _places(model: Mapping[str, Any], added: set[str]) -> dict[str, int]:
    """Return each joined piece's place among them, by the merges."""
    places: dict[str, int] = {}
    merges = set()
    for merge in model.get("merges") or ():
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        merges.add((left, right))
        places.setdefault(left + right, len(places))
    vocabulary = model["vocab"]
    for text in vocabulary:
        if text in added or _BYTE.fullmatch(text):
            continue
        for n in range(1, len(text)):
            left, right = text[:n], text[n:]
            parts = {left, right}
            if parts <= vocabulary.keys() and not parts & added and (left, right) not in merges:
                raise NotImplementedError(
                    f"byte pairs that are no SentencePiece model: {text!r} is a piece, and "
                    f"{left!r} and {right!r} are never joined"
                )
    return places


def _steps(tokenizer: Mapping[str, Any], name: str) -> tuple[Mapping[str, Any], ...]:
    whole = tokenizer.get(name) or {}
    inner = whole.get("normalizers") or whole.get("pretokenizers")
    return tuple(inner) if inner else (whole,)


def _read(path: Path) -> Any:
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}
