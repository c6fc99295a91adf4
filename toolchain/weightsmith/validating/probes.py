"""Probes: chats rendered by the folder's chat template, as token ids."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightsmith.core.time_limits import doing
from weightsmith.core.values import Json
from weightsmith.forward.libraries import load_tokenizer, reading
from weightsmith.models.folder import check_adapter_folder
from weightsmith.models.templates import render_chat
from weightsmith.models.tokenizer_files import is_named_template
from weightsmith.validating.findings import ERROR, WARNING, Finding, finding

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
    tokenizer: PreTrainedTokenizerBase, items: Sequence[Sequence[Message]], vocabulary: int
) -> list[list[int]]:
    """Return token ids of the items, the last MOST_TOKENS of each."""
    if tokenizer is None:
        return _random_tokens(vocabulary)
    texts = [_text(tokenizer, item) for item in items]
    with doing(f"tokenizing the probes with the tokenizer of {tokenizer.name_or_path}"):
        ids = [
            list(tokenizer(text, add_special_tokens=not tokenizer.chat_template)["input_ids"])
            for text in texts
        ]
    # Keep the end of a prompt, where the answer begins.
    return [part[-MOST_TOKENS:] or [0] for part in ids]


def most_logits(count: int, vocabulary: int) -> int:
    """Return for how many tokens of each of `count` probes logits fit into memory."""
    return max(4, _LOGIT_BYTES // (4 * max(1, vocabulary * count)))


def _random_tokens(vocabulary: int) -> list[list[int]]:
    """Return random tokens with a fixed seed, for models without a tokenizer."""
    draw = random.Random(0)  # noqa: S311 - nothing secret
    return [[draw.randrange(max(1, vocabulary)) for _ in range(24)] for _ in BUILT_IN]


def compare(
    expected: PreTrainedTokenizerBase, merged: PreTrainedTokenizerBase, vocabulary: int, base: Path
) -> list[Finding]:
    """Compare the merged folder's tokenizer and chat template with the expected ones.

    `vocabulary` is the number of rows of the model's embedding.
    """
    found: list[Finding] = []
    if expected.chat_template and not merged.chat_template:
        found.append(
            finding(ERROR, "tokenizer", "the chat template is missing", "chat_template.jinja")
        )
    elif expected.chat_template != merged.chat_template:
        found.append(
            finding(ERROR, "tokenizer", "the chat template differs", "chat_template.jinja")
        )
    for name in ("eos_token", "bos_token"):
        before, after = getattr(expected, name), getattr(merged, name)
        if before != after:
            message = f"the tokenizer's {name} is {after!r}, not {before!r}"
            found.append(finding(ERROR, "tokenizer", message, "tokenizer_config.json"))
    found += _round_trip(expected, merged)
    return [*found, *_not_embedded(merged, vocabulary, base)]


def _not_embedded(merged: PreTrainedTokenizerBase, vocabulary: int, base: Path) -> list[Finding]:
    """Report tokens that the model does not embed.

    A warning if the base's tokenizer has them too (such as Gemma 3's image token), else an error:
    their embeddings are missing.
    """
    lacking = {text for text, number in merged.get_vocab().items() if number >= vocabulary > 0}
    if not lacking:
        return []
    known = set(load_tokenizer(base).get_vocab()) if has_tokenizer(base) else set()
    message = f"the tokenizer has {len(merged)} tokens, but the model embeds {vocabulary}"
    if lacking <= known:
        message += f", as in the base: {', '.join(sorted(lacking)[:3])}"
    severity = WARNING if lacking <= known else ERROR
    return [finding(severity, "tokenizer", message, "tokenizer.json")]


def _round_trip(
    expected: PreTrainedTokenizerBase, merged: PreTrainedTokenizerBase
) -> list[Finding]:
    """Compare both tokenizers' encoding and decoding of some texts."""
    for text in (*ROUND_TRIP, *(item[0]["content"] for item in BUILT_IN)):
        expected_ids, merged_ids = expected(text)["input_ids"], merged(text)["input_ids"]
        if expected_ids != merged_ids:
            place = next(
                (
                    i
                    for i, (a, b) in enumerate(zip(expected_ids, merged_ids, strict=False))
                    if a != b
                ),
                min(len(expected_ids), len(merged_ids)),
            )
            message = (
                f"the tokenizer differs: {text[:24]!r}… is encoded differently from token {place} "
                "on"
            )
            return [finding(ERROR, "tokenizer", message, "tokenizer.json")]
        if expected.decode(expected_ids) != merged.decode(merged_ids):
            message = f"the tokenizer decodes {text[:24]!r}… differently"
            return [finding(ERROR, "tokenizer", message, "tokenizer.json")]
    if expected.get_vocab() != merged.get_vocab():
        message = "the tokenizer's vocabulary differs"
        return [finding(ERROR, "tokenizer", message, "tokenizer.json")]
    return []


def _text(tokenizer: PreTrainedTokenizerBase, item: Sequence[Message]) -> str:
    if tokenizer.chat_template:
        return render_chat(tokenizer, item, answer=True)
    return "\n".join(message["content"] for message in item)


def _template(root: Path, files: Sequence[str]) -> Json:
    """Return a folder's chat template, several as a dictionary by name, or ""."""
    named = {
        Path(name).stem: (root / name).read_text("utf-8")
        for name in files
        if is_named_template(name)
    }
    default = _default_template(root, files)
    if isinstance(default, str):
        return {"default": default, **named} if default and named else default or named
    return {str(entry["name"]): entry["template"] for entry in default}


def _default_template(root: Path, files: Sequence[str]) -> Json:
    """Return a folder's template outside the folder of named ones: a text, a list, or ""."""
    from weightsmith.core.safe_parse import read_json

    if _TEMPLATES[0] in files:
        return (root / _TEMPLATES[0]).read_text("utf-8")
    for name in (_TEMPLATES[1], "tokenizer_config.json"):
        if name in files:
            value = read_json(root / name).get("chat_template")
            if isinstance(value, str | list):
                return value
    return ""
