"""Find evaluation questions in training or calibration text."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from weightsmith.core.errors import UsageError
from weightsmith.core.safe_parse import parse, small_file
from weightsmith.core.values import JsonValue
from weightsmith.evaluating.items import Item

_SHORTEST = 12
"""Shorter questions may occur in other texts by chance."""
_KEPT = 4 << 20
"""Bytes of a file whose texts stay in memory for the next build."""
_LONGEST_LINE = 64 << 20


def describe_contamination(items: Sequence[Item], other: Path) -> str:
    """Return one line about questions that a JSON Lines file also asks, or contains word for word.

    '' if there are none. Case, white space and punctuation are ignored. Lines have `{"text"}`,
    `{"prompt"}` or `{"messages"}`. Raises UsageError for a file that cannot be read.
    """
    # The same words about another picture are another question.
    texts = (item for item in items if not item.pictures)
    asked = {key: item for item in texts if (key := _key(item.prompt))}
    searched = _by_part(asked)
    found: dict[int, int] = {}  # line of a question -> first line that has it
    data = small_file(other, _KEPT)
    for number, text, whole in _kept(other, data) if data else _read(other):
        hits = [text] if text in asked else []
        if not whole:
            hits += [key for key in _likely(text, searched) if key in text]
        for key in hits:
            found.setdefault(asked[key].line, number)
    if not found:
        return ""
    shown = ", ".join(f"line {line} in line {found[line]}" for line in sorted(found)[:5])
    more = f" and {len(found) - 5} more" if len(found) > 5 else ""
    return (
        f"{other} contains {len(found)} evaluation question(s): {shown}{more};"
        " the score does not apply to new questions"
    )


def _by_part(keys: Iterable[str]) -> Mapping[str, Sequence[str]]:
    """Return the questions that are long enough to be searched for, by some letters of theirs.

    Of five places, those letters that fewest questions have: many begin, go on or end alike.
    """
    parts = {
        key: [
            key[at : at + _SHORTEST] for at in ((len(key) - _SHORTEST) * n // 4 for n in range(5))
        ]
        for key in keys
        if len(key) >= _SHORTEST
    }
    counts = Counter(part for some in parts.values() for part in some)
    found: dict[str, list[str]] = {}
    for key, some in parts.items():
        found.setdefault(min(some, key=counts.__getitem__), []).append(key)
    return found


def _likely(text: str, questions: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Yield the questions of which a text has those letters: a few of 100,000, found at once."""
    places = range(len(text) - _SHORTEST + 1)
    for part in {some for i in places if (some := text[i : i + _SHORTEST]) in questions}:
        yield from questions[part]


@lru_cache(maxsize=2)  # the builds of a fleet share it
def _kept(path: Path, _content: bytes) -> tuple[tuple[int, str, bool], ...]:
    return tuple(_read(path))


def _read(path: Path) -> Iterator[tuple[int, str, bool]]:
    """Yield line number, normalised text, and whether it must match as a whole (a message)."""
    try:
        with path.open(encoding="utf-8-sig") as stream:
            lines = iter(lambda: stream.readline(_LONGEST_LINE + 1), "")
            for number, line in enumerate(lines, start=1):
                if len(line) > _LONGEST_LINE:
                    raise UsageError(
                        f"{path}:{number} is longer than {_LONGEST_LINE} characters",
                        hint="use JSON Lines, one text per line",
                    )
                if not line.strip():
                    continue
                try:
                    value = parse(line, pairs=False)  # training text may contain lone surrogates
                except ValueError as error:
                    raise UsageError(
                        f"{path}:{number}: invalid JSON: {error}",
                        hint='a line is {"text": "…"} or {"messages": […]}',
                    ) from None
                for text, whole in _parts(value):
                    yield number, _key(text), whole
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"cannot read {path}: {error}", hint="give the path of a JSON Lines file"
        ) from None


def _parts(value: JsonValue) -> Iterator[tuple[str, bool]]:
    if not isinstance(value, dict):
        return
    for name, whole in (("text", False), ("prompt", True)):
        if isinstance(value.get(name), str):
            yield value[name], whole
    messages = value.get("messages")
    for message in messages if isinstance(messages, list) else ():
        if isinstance(message, dict) and isinstance(message.get("content"), str):
            yield message["content"], True


def _key(text: str) -> str:
    folded = unicodedata.normalize("NFKC", text).casefold()
    words = "".join(c if c.isalnum() else " " for c in folded)
    return " ".join(words.split())
