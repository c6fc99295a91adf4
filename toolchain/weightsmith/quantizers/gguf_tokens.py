"""Compare a GGUF file's tokenizer with the checkpoint's: tokens, merges, special tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from weightsmith.core.errors import CheckFailed
from weightsmith.core.safe_parse import TOKENIZER, parse_file
from weightsmith.core.values import Json
from weightsmith.quantizers.gguf_file import GGUFModel

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
