"""Create SentencePiece files for llama.cpp's converter from a tokenizer.json.

Tokenizers of Llama 2, Mistral and Gemma are SentencePiece models, but transformers (for example
with an adapter) writes only tokenizer.json. Without the SentencePiece model the converter fails, or
gives all pieces the same score, so that llama.cpp tokenizes differently than in training. It also
reads added tokens only from tokenizer_config.json, which may no longer have them.

The order of merges is the order of scores. The base's own file does not do, since the adapter's
tokenizer may differ; byte-pair vocabularies that never were SentencePiece are refused.
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

from weightsmith.core.errors import InputRefused
from weightsmith.core.safe_parse import TOKENIZER, parse_file

_MODEL, _TOKENIZER, _CONFIG = "tokenizer.model", "tokenizer.json", "tokenizer_config.json"
_UNKNOWN = "<unk>"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_MOST, _LONGEST = 4_000_000, 4096
"""Pieces, and characters of one; the largest vocabularies have a million and some hundred."""


@contextmanager
def with_pieces(model: Path) -> Iterator[Path]:
    """Yield a folder with the model's files and the tokenizer files that the converter needs.

    This is the model's folder if none are missing. Raises NotImplementedError for BPE with byte
    fallback that is not a SentencePiece model, which llama.cpp does not support.
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
    """Return the SentencePiece model of a tokenizer.json, with equivalent scores.

    SentencePiece merges the neighbours with the highest score, tokenizer.json those with the first
    merge; so minus a merge's index is an equivalent score
    (https://github.com/google/sentencepiece, src/bpe_model.cc). Raises NotImplementedError if that
    does not hold: two pieces form another piece, but there is no such merge. Raises InputRefused
    for numbers of pieces that none has, up to which unused ones would be written.
    """
    pb: Any = importlib.import_module("sentencepiece.sentencepiece_model_pb2")
    vocabulary: dict[str, int] = tokenizer["model"]["vocab"]
    special = {t["content"] for t in tokenizer.get("added_tokens", ()) if t.get("special")}
    added = {t["content"] for t in tokenizer.get("added_tokens", ())}
    unknown = tokenizer["model"].get("unk_token") or _UNKNOWN
    _check_vocabulary(vocabulary)
    places = _places(tokenizer["model"], added)
    if unknown not in vocabulary:
        raise NotImplementedError("not a SentencePiece model: BPE without an unknown token")
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
        # Single characters come after all merged pieces, as in SentencePiece's trainer.
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


def _check_vocabulary(vocabulary: Mapping[str, int]) -> None:
    odd = (n for n in vocabulary.values() if type(n) is not int or not 0 <= n < _MOST)
    for number in odd:
        raise InputRefused(
            f"{_TOKENIZER} gives a piece the number {str(number)[:40]}",
            hint="compare the file with the base's: numbers of pieces are those of embedding rows",
        )
    if (longest := max(map(len, vocabulary), default=0)) > _LONGEST:
        raise InputRefused(
            f"{_TOKENIZER} has a piece of {longest} characters",
            hint=f"compare the file with the base's: no vocabulary has pieces of over {_LONGEST}",
        )


def starts_with_space(tokenizer: Mapping[str, Any]) -> bool:
    """Return whether the tokenizer prepends a space to texts."""
    for step in (*_steps(tokenizer, "normalizer"), *_steps(tokenizer, "pre_tokenizer")):
        if step.get("type") == "Prepend":
            return True
        if step.get("type") == "Metaspace":
            return bool(step.get("prepend_scheme", "always") != "never")
    return False


def _has_byte_pieces(tokenizer: Mapping[str, Any]) -> bool:
    """Return whether this is BPE with byte fallback."""
    model = tokenizer.get("model") or {}
    return bool(model.get("type") == "BPE" and model.get("byte_fallback"))


def _places(model: Mapping[str, Any], added: set[str]) -> dict[str, int]:
    """Return each merged piece's index in the merges."""
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
                    f"not a SentencePiece model: {text!r} is a piece, but there is no merge of "
                    f"{left!r} and {right!r}"
                )
    return places


def _steps(tokenizer: Mapping[str, Any], name: str) -> tuple[Mapping[str, Any], ...]:
    whole = tokenizer.get(name) or {}
    inner = whole.get("normalizers") or whole.get("pretokenizers")
    return tuple(inner) if inner else (whole,)


def _read(path: Path) -> Any:
    return parse_file(path, largest=TOKENIZER) if path.is_file() else {}
