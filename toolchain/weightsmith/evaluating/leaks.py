"""Finds questions of an evaluation in the text that a model was trained or calibrated on."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from weightsmith.errors import UsageError
from weightsmith.evaluating.items import Item
from weightsmith.foreign import parse
from weightsmith.values import Json

_SHORTEST = 12
"""Characters below which a question may stand in another text by chance."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Leak:
    """One question of the evaluation that stands in another file."""

    line: int
    """In the evaluation's data."""
    other: Path
    other_line: int
    prompt: str


def find_leaks(items: Sequence[Item], other: Path) -> tuple[Leak, ...]:
    """Return the questions that are also asked, or stand word for word, in a JSON Lines file.

    Case, white space and punctuation do not count. The file has `{"text"}`, `{"prompt"}` or
    `{"messages"}` in each line. Raises UsageError for a file that cannot be read.
    """
    asked = {key: item for item in items if (key := _key(item.prompt))}
    long = [(key, item) for key, item in asked.items() if len(key) >= _SHORTEST]
    found: dict[int, Leak] = {}
    for number, text, whole in _texts(other):
        hits = [asked[text]] if text in asked else []
        if not whole:
            hits += [item for key, item in long if key in text]
        for item in hits:
            leak = Leak(line=item.line, other=other, other_line=number, prompt=item.prompt)
            found.setdefault(item.line, leak)
    return tuple(found[line] for line in sorted(found))


def describe(leaks: Sequence[Leak]) -> str:
    """Say in one line which questions leaked; '' for none."""
    if not leaks:
        return ""
    shown = ", ".join(f"line {x.line} in line {x.other_line}" for x in leaks[:5])
    more = f" and {len(leaks) - 5} more" if len(leaks) > 5 else ""
    return (
        f"{len(leaks)} evaluation question(s) stand in {leaks[0].other}: {shown}{more};"
        " the score says nothing about new questions"
    )


def _texts(path: Path) -> Iterator[tuple[int, str, bool]]:
    """Yield line number, normal form, and whether it is one message: short ones match whole."""
    try:
        with path.open(encoding="utf-8-sig") as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    for text, whole in _parts(_parse(line, f"{path}:{number}")):
                        yield number, _key(text), whole
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"cannot read {path}: {error}", hint="give the path of a JSON Lines file"
        ) from None


def _parse(line: str, where: str) -> Json:
    try:
        return parse(line, pairs=False)  # a text that was cut within an emoji is trained on, too
    except ValueError as error:
        raise UsageError(
            f"{where} is not JSON: {error}", hint='a line is {"text": "…"} or {"messages": […]}'
        ) from None


def _parts(value: Json) -> Iterator[tuple[str, bool]]:
    if not isinstance(value, dict):
        return
    for name, whole in (("text", False), ("prompt", True)):
        if isinstance(value.get(name), str):
            yield value[name], whole
    for message in value.get("messages") or ():
        if isinstance(message, dict) and isinstance(message.get("content"), str):
            yield message["content"], True


def _key(text: str) -> str:
    folded = unicodedata.normalize("NFKC", text).casefold()
    words = "".join(c if c.isalnum() else " " for c in folded)
    return " ".join(words.split())
