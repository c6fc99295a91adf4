"""Probes, as token ids of chats in the folder's template, and the greedy texts after them.

Only the merged model generates. The reference reads the same tokens in one forward pass, and
agrees up to the first token that is not its most likely one.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from weightsmith.core.safe_parse import read_json
from weightsmith.core.time_limits import doing
from weightsmith.core.values import Json
from weightsmith.forward.libraries import load_tokenizer, reading
from weightsmith.forward.weights import Weights
from weightsmith.models.folder import check_adapter_folder
from weightsmith.models.templates import is_named_template, render_chat
from weightsmith.validating.forwards import ProbeBatch
from weightsmith.validating.result import ERROR, WARNING, Finding, GreedyText, LogitLimits, finding

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, str]

BUILT_IN: tuple[tuple[Message, ...], ...] = tuple(
    ({"role": "user", "content": text},)
    for text in (
        "What is the capital of France, and what is it known for?",
        "Write a Python function that returns the sum of a list of numbers.",
        "Summarise in one sentence why the sky is blue.",
        "Translate to German: The meeting is at 3:45 pm on Thursday.",
        "17 + 25 * 3 = ?",
        'Return JSON with the keys "name" and "age" for Ada, 36.',
    )
)
"""Used if neither the recipe nor the user provides questions."""

ROUND_TRIP = (
    "The quick brown fox, 1234567890!\n\tdef f(x): return x**2  # ok",
    "Äpfel, naïve café, Σωκράτης, Привет, 你好, नमस्ते, 🦙🚀",
    "  leading and trailing  ",
)
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
_TEMPLATES = ("chat_template.jinja", "chat_template.json")
MOST_PROBES = 8
MOST_TOKENS = 64
_LOGIT_BYTES = 96 << 20
"""Memory limit for one side's logits."""
_MOST_NEW = 16
"""Tokens generated after a probe."""
_FEW_NEW, _LARGE = 4, 10_000_000_000
"""The same for a model with so many weights: they are read again for every token."""
_TAIL = 80
"""Characters of a probe that are reported."""
_ROOM = 4.0
"""Factor on the limits, which were measured with other probes and so with other roundings."""


def choose(items: Sequence[Sequence[Message]]) -> list[Sequence[Message]]:
    """Return at most MOST_PROBES items, spread evenly; the built-in ones if there are none."""
    if not items:
        return list(BUILT_IN)
    count = min(len(items), MOST_PROBES)
    return [items[i * len(items) // count] for i in range(count)]


def has_tokenizer(root: Path) -> bool:
    """Return whether a folder has a tokenizer."""
    return any((root / name).is_file() for name in _TOKENIZERS)


def expected_tokenizer(base: Path, adapters: Sequence[Path]) -> PreTrainedTokenizerBase:
    """Return the tokenizer that the merged model must have: the last adapter's, else the base's.

    An adapter may also have a chat template only. None if there is no tokenizer. Raises
    InputRefused if it cannot be loaded.
    """
    if not any(has_tokenizer(root) for root in (base, *adapters)):
        return None
    root, author = base, base
    template: Any = ""
    for adapter in adapters:
        files = check_adapter_folder(adapter)
        if any(name in files for name in _TOKENIZERS):
            root, template = adapter, ""
        with reading(f"the chat template of {adapter}", "write it again: a text in UTF-8"):
            found = _template(adapter, files)
        template, author = (found, adapter) if found else (template, author)
    tokenizer = load_tokenizer(root)
    if template:
        tokenizer.chat_template = template
        tokenizer.name_or_path = str(author)  # for messages: whose template it is
    elif not tokenizer.chat_template and root != base and has_tokenizer(base):
        tokenizer.chat_template = load_tokenizer(base).chat_template
    return tokenizer


def encode(
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Sequence[Message]],
    vocabulary: int,
    *,
    chats: bool = True,
) -> list[list[int]]:
    """Return token ids of the items, the last MOST_TOKENS of each; random without tokenizer.

    The chat template of a model that does not chat has other roles, so it is left out.
    """
    if tokenizer is None:
        draw = random.Random(0)  # noqa: S311 - nothing secret
        return [[draw.randrange(max(1, vocabulary)) for _ in range(24)] for _ in BUILT_IN]
    worded = bool(tokenizer.chat_template) and chats
    texts = [
        render_chat(tokenizer, item, answer=True)
        if worded
        else "\n".join(message["content"] for message in item)
        for item in items
    ]
    with doing(f"tokenizing the probes with the tokenizer of {tokenizer.name_or_path}"):
        ids = [list(tokenizer(text, add_special_tokens=not worded)["input_ids"]) for text in texts]
    # Keep the end of a prompt, where the answer begins.
    return [part[-MOST_TOKENS:] or [0] for part in ids]


def most_logits(count: int, vocabulary: int) -> int:
    """Return for how many tokens of each of `count` probes logits fit into memory."""
    return max(4, _LOGIT_BYTES // (4 * max(1, vocabulary * count)))


def compare(
    expected: PreTrainedTokenizerBase, merged: PreTrainedTokenizerBase, vocabulary: int, base: Path
) -> list[Finding]:
    """Compare the merged folder's tokenizer and chat template with the expected ones.

    `vocabulary` is the number of rows of the model's embedding.
    """
    found: list[Finding] = []
    if expected.chat_template != merged.chat_template:
        lost = expected.chat_template and not merged.chat_template
        message = f"the chat template {'is missing' if lost else 'differs'}"
        found.append(finding(ERROR, "tokenizer", message, "chat_template.jinja"))
    for name in ("eos_token", "bos_token"):
        before, after = getattr(expected, name), getattr(merged, name)
        if before != after:
            message = f"the tokenizer's {name} is {after!r}, not {before!r}"
            found.append(finding(ERROR, "tokenizer", message, "tokenizer_config.json"))
    if difference := _difference(expected, merged):
        message = f"the tokenizer{difference}"
        found.append(finding(ERROR, "tokenizer", message, "tokenizer.json"))
    lacking = {text for text, number in merged.get_vocab().items() if number >= vocabulary > 0}
    if lacking:
        own = set(load_tokenizer(base).get_vocab()) if has_tokenizer(base) else set()
        message = f"the tokenizer has {len(merged)} tokens, but the model embeds {vocabulary}"
        if lacking <= own:  # such as Gemma 3's image token
            message += f", as in the base: {', '.join(sorted(lacking)[:3])}"
        severity = WARNING if lacking <= own else ERROR
        found.append(finding(severity, "tokenizer", message, "tokenizer.json"))
    return found


def _difference(expected: PreTrainedTokenizerBase, merged: PreTrainedTokenizerBase) -> str:
    """Return how encoding or decoding of some texts differs, or the vocabulary; "" if nothing."""
    for text in (*ROUND_TRIP, *(item[0]["content"] for item in BUILT_IN)):
        expected_ids, merged_ids = expected(text)["input_ids"], merged(text)["input_ids"]
        if expected_ids != merged_ids:
            pairs = enumerate(zip(expected_ids, merged_ids, strict=False))
            shorter = min(len(expected_ids), len(merged_ids))
            place = next((i for i, (a, b) in pairs if a != b), shorter)
            return f" differs: {text[:24]!r}… is encoded differently from token {place} on"
        if expected.decode(expected_ids) != merged.decode(merged_ids):
            return f" decodes {text[:24]!r}… differently"
    return "'s vocabulary differs" if expected.get_vocab() != merged.get_vocab() else ""


def _template(root: Path, files: Sequence[str]) -> str | dict[str, str]:
    """Return a folder's chat template, several as a dictionary by name, or ""."""
    named = {
        Path(name).stem: (root / name).read_text("utf-8")
        for name in files
        if is_named_template(name)
    }
    default: Json = ""
    if _TEMPLATES[0] in files:
        default = (root / _TEMPLATES[0]).read_text("utf-8")
    else:
        there = [name for name in (_TEMPLATES[1], "tokenizer_config.json") if name in files]
        values = (read_json(root / name).get("chat_template") for name in there)
        default = next((value for value in values if isinstance(value, str | list)), "")
    if isinstance(default, list):
        return {str(entry["name"]): entry["template"] for entry in default}
    return {"default": default, **named} if default and named else default or named


def most_new(weights: Weights) -> int:
    """Return how many tokens are generated after a probe."""
    count = sum(math.prod(info.shape) for info in weights.infos.values())
    return _FEW_NEW if count > _LARGE else _MOST_NEW


def drafts(
    probes: Sequence[Sequence[int]], known: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> dict[int, Sequence[int]]:
    """Return probable texts by the probe's number: a probe is the end of a known question."""
    ends = {tuple(asked[-most:]): answer for asked, answer in known for most in {*map(len, probes)}}
    texts = {number: ends.get(tuple(probe), ()) for number, probe in enumerate(probes)}
    return {number: text for number, text in texts.items() if text}


def known(
    probes: Sequence[Sequence[int]],
    answers: Sequence[tuple[Sequence[int], Sequence[int]]],
    ends: Sequence[int],
    most: int,
) -> dict[int, list[int]]:
    """Return texts by the probe's number: those of probes that are whole questions with answers.

    An answer that was cut off before `most` tokens is not the text.
    """
    whole, found = {tuple(asked): answer for asked, answer in answers}, dict[int, list[int]]()
    for number, probe in enumerate(probes):
        answer = list(whole.get(tuple(probe), ()))[:most]
        end = next((i + 1 for i, token in enumerate(answer) if token in ends), 0)
        if end or len(answer) == most:
            found[number] = answer[: end or most]
    return found


def longer(probes: Sequence[Sequence[int]], texts: Sequence[Sequence[int]]) -> list[Sequence[int]]:
    """Return the probes followed by the generated tokens except the last, which needs no logits."""
    return [[*probe, *text[:-1]] for probe, text in zip(probes, texts, strict=True)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """One greedy text, and where the reference disagrees with it."""

    probe: Sequence[int]
    tokens: tuple[int, ...]
    """Generated by the merged model."""
    differs_at: int | None = None
    """Index of the first token that the reference would not have chosen."""
    other: int = 0
    """The token that the reference would have chosen there."""
    margin: float = 0.0
    """The reference's logit of `other` minus that of the generated token."""


def read(
    reference: torch.Tensor, merged: torch.Tensor, batch: ProbeBatch, texts: Sequence[Sequence[int]]
) -> Iterator[Text]:
    """Yield each probe's greedy text, compared by the logits of both sides.

    Without generated tokens, it is the one token that follows the probe.
    """
    stops = accumulate(batch.counted)
    for row, (stop, length) in enumerate(zip(stops, batch.lengths, strict=True)):
        tokens = tuple(texts[row]) if texts else (int(merged[stop - 1].argmax()),)
        probe = batch.ids[row, : length - len(tokens) + 1].tolist()
        logits = reference[stop - len(tokens) : stop]
        chosen = logits.argmax(-1).tolist()
        place = next((i for i, token in enumerate(tokens) if chosen[i] != token), None)
        if place is None:
            yield Text(probe=probe, tokens=tokens)
        else:
            margin = float(logits[place].max() - logits[place, tokens[place]])
            yield Text(
                probe=probe, tokens=tokens, differs_at=place, other=chosen[place], margin=margin
            )


def described(texts: Sequence[Text], tokenizer: PreTrainedTokenizerBase) -> tuple[GreedyText, ...]:
    """Return each text, decoded; none without a tokenizer."""
    if tokenizer is None:
        return ()
    rows = []
    for text in texts:
        count, same = len(text.tokens), text.differs_at
        agreed = text.tokens if same is None else (*text.tokens[:same], text.other)
        after = " ".join(tokenizer.decode(text.probe, skip_special_tokens=True).split())
        if len(after) > _TAIL:  # its end, from a word on
            after = f"… {after[-_TAIL:].partition(' ')[2]}"
        rows.append(
            GreedyText(
                after=after,
                reference=tokenizer.decode(agreed),
                merged=tokenizer.decode(text.tokens),
                tokens=count,
                same=count if same is None else same,
            )
        )
    return tuple(rows)


def judge(texts: Sequence[Text], allowed: LogitLimits) -> list[Finding]:
    """Return a finding if the merged model generates other tokens and no near tie explains it."""
    wrong = [t for t in texts if t.differs_at is not None and t.margin > _ROOM * allowed.max_abs]
    if not wrong:
        return []
    first = min(text.differs_at or 0 for text in wrong)
    return [
        finding(
            ERROR,
            "logits",
            f"{len(wrong)} of {len(texts)} greedy texts differ from base + adapter, first at "
            f"token {first + 1}, by a margin of up to "
            f"{max(text.margin for text in wrong):.3g}",
        )
    ]
