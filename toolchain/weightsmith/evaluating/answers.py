"""Questions and answers as the report shows them: equal answers together, long ones cut.

So a thousand questions fit into a megabyte; build.json has the full texts.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

PATHS = ("base", "adapter", "merged", "dequantized", "image")
"""Who is asked, in the order of a build."""

_PAGE_BYTES = 940_000
"""Of all questions with their markup: the whole page then stays below a megabyte."""
_ROW_BYTES, _ANSWER_BYTES = 190, 90
"""Markup of a question and of an answer, at most."""
_SHORTEST, _LONGEST = 20, 1200


def rows(items: Sequence[Mapping[str, Any]], budget: int = _PAGE_BYTES) -> list[dict[str, Any]]:
    """Return one row per question: `prompt`, `expected`, `answers`, and what it is filtered by.

    Each of `answers` is `{who, ok, text}` with everyone who gave the same answer; `changed` where a
    later subject is not right or wrong as an earlier one was, from the adapter on; `lost` where
    the image, or its dequantized weights, are wrong and the adapter was right.
    """
    longest = _cut_length(items, budget)
    return [_row(number, item, longest) for number, item in enumerate(items, start=1)]


def _row(number: int, item: Mapping[str, Any], longest: int) -> dict[str, Any]:
    said: dict[tuple[str, bool], list[str]] = {}
    for path in PATHS:
        if path in item:
            said.setdefault((str(item[path]), bool(item["ok"].get(path))), []).append(path)
    later = [bool(item["ok"][path]) for path in PATHS[1:] if path in item["ok"]]
    ok = item["ok"]
    before = ok.get("adapter", ok.get("base", True))
    served = ok.get("image", ok.get("dequantized"))
    return {
        "number": number,
        "prompt": cut(str(item["prompt"]), longest),
        "expected": [cut(str(text), longest) for text in item["expected"]],
        "answers": [
            {"who": who, "ok": right, "text": cut(text, longest)}
            for (text, right), who in said.items()
        ],
        "changed": len(set(later)) > 1,
        "worded": len({text for (text, _), who in said.items() if who != ["base"]}) > 1,
        "wrong": not (ok.get("merged", True) if served is None else served),
        "lost": bool(before) and served is not None and not served,
    }


def _cut_length(items: Sequence[Mapping[str, Any]], budget: int) -> int:
    """Return the length in characters at which texts are cut, so that all fit so many bytes."""
    texts: list[str] = []
    markup = 0
    for item in items:
        said = {str(item[path]) for path in PATHS if path in item}
        markup += _ROW_BYTES + len(said) * _ANSWER_BYTES
        texts += [*said, str(item["prompt"]), *map(str, item["expected"])]
    # Escaped, and in UTF-8: a character may take many bytes.
    sizes = [(len(text), len(html.escape(text).encode("utf-8", "replace"))) for text in texts]
    longest = _LONGEST
    while longest > _SHORTEST and markup + _bytes(sizes, longest) > budget:
        longest = max(_SHORTEST, longest * 4 // 5)
    return longest


def _bytes(sizes: Sequence[tuple[int, int]], longest: int) -> float:
    return sum(size * min(1.0, (longest + 3) / length) for length, size in sizes if length)


def cut(text: str, longest: int) -> str:
    """Return a text of at most that many characters, its middle left out."""
    if len(text) <= longest:
        return text
    head = longest * 2 // 3
    return f"{text[:head]} … {text[len(text) - (longest - head) :]}"


def counts(found: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Return how many rows each filter shows."""
    return {
        "all": len(found),
        "changed": sum(row["changed"] for row in found),
        "worded": sum(row["worded"] for row in found),
        "wrong": sum(row["wrong"] for row in found),
    }
