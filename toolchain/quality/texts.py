"""Texts as a model reads them: its chat template applied, cut into its tokens."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.errors import InputRefused
from toolchain.values import Json


def as_lines(model: Path, rows: Sequence[Mapping[str, Json]]) -> str:
    """Return JSON Lines `{text, tokens}`: what each row reads like, and its number of tokens.

    Raises InputRefused for conversations where the model has no chat template for them.
    """
    tokenizer = load_tokenizer(model)
    texts = rendered(tokenizer, rows)
    lengths = [len(ids) for ids in _ids(tokenizer, texts)]
    return "".join(
        json.dumps({"text": text, "tokens": tokens}, ensure_ascii=False) + "\n"
        for text, tokens in zip(texts, lengths, strict=True)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """One text in tokens, and where what the model itself would say begins."""

    ids: tuple[int, ...]
    answer: int
    """Index of the last answer's first token in a conversation; 1 in plain text."""


def readings(model: Path, rows: Sequence[Mapping[str, Json]]) -> list[Reading]:
    """Return each row in tokens, through the chat template where it is a conversation."""
    tokenizer = load_tokenizer(model)
    found = []
    for row in rows:
        (ids,) = _ids(tokenizer, [_rendered(tokenizer, row)])
        found.append(Reading(ids=tuple(ids), answer=_answer(tokenizer, row, ids)))
    return found


def _answer(tokenizer: Any, row: Mapping[str, Json], ids: Sequence[int]) -> int:
    """Return where the last answer begins; 1 where the template does not tell."""
    messages = row.get("messages", [])
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        return 1
    question = tokenizer.apply_chat_template(
        messages[:-1], tokenize=False, add_generation_prompt=True
    )
    (before,) = _ids(tokenizer, [question])
    return len(before) if list(ids[: len(before)]) == before and len(before) < len(ids) else 1


def load_tokenizer(model: Path) -> Any:
    """Return a checkpoint's tokenizer, from local files alone."""
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model, local_files_only=True, trust_remote_code=False)


def rendered(tokenizer: Any, rows: Iterable[Mapping[str, Json]]) -> list[str]:
    """Return each row's text; conversations through the chat template."""
    return [_rendered(tokenizer, row) for row in rows]


def _rendered(tokenizer: Any, row: Mapping[str, Json]) -> str:
    if "text" in row:
        return str(row["text"])
    if not tokenizer.chat_template:
        raise InputRefused(
            "the calibration text has conversations and the model has no chat template",
            hint='give it as {"text": …}, or add a chat template to the model',
        )
    try:
        return str(tokenizer.apply_chat_template(row["messages"], tokenize=False))
    except Exception as error:  # noqa: BLE001 - templates raise what they like
        raise InputRefused(
            f"the model's chat template refuses a calibration text: {error}",
            hint="write the conversations as the model expects them",
        ) from None


def _ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    # The template writes the begin token itself; plain text has none inside a stream either.
    return [list(ids) for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]
