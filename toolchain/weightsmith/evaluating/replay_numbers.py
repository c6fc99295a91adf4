"""Replay sets of models that do not chat: numbers in place of tokens, and how far they may move.

Two machines each give what the float32 reference gives, moved by rounding to the served weights and
in their own arithmetic. By the triangle inequality, they part by no more than twice the largest
such move, which the build saw on the questions themselves. docs/reference/replay.md has the rule.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from weightsmith.core.values import Json
from weightsmith.core.vectors import unpacked

VECTORS, SCORES, LABELS, TOKENS = "/v1/embeddings", "/v1/rerank", "/classify", "/pooling"
PATHS = (VECTORS, SCORES, LABELS, TOKENS)
MOST = 1 << 17
"""Numbers of a set: the program in images reads no more values than 200,000."""
DIGITS = 5
"""Significant ones that a set keeps."""
_LEAST, _MOST = {VECTORS: 2e-4}, {VECTORS: 0.05}
"""Of 1 - cosine: angles of 1.1 and 18 degrees."""
_LEAST_PART, _MOST_PART = 0.03, 0.25
"""Of the largest number of a set, or of 1 if that is smaller: labels have probabilities."""


def numbers_in(path: str, answer: Mapping[str, Json]) -> tuple[float, ...]:
    """Return the numbers of an answer, in the order of what was asked; raises ValueError for none.

    A vector; a score for each document; a probability for each label, of a text or of each token.
    """
    try:
        if path == SCORES:
            rows = {row["index"]: row["relevance_score"] for row in answer["results"]}
            found = [rows[place] for place in range(len(answer["results"]))]
        else:
            (row,) = answer["data"]
            if path == TOKENS:
                found = [number for token in row["data"] for number in token]
            else:
                found = row["embedding" if path == VECTORS else "probs"]
        numbers = tuple(float(f"{number:.{DIGITS}g}") for number in found)
    except (LookupError, TypeError, ValueError, AttributeError):
        raise ValueError("the response has no numbers of the kind that was asked for") from None
    if not 0 < len(numbers) <= MOST or not all(map(math.isfinite, numbers)):
        raise ValueError(f"the response has {len(numbers)} numbers, or not all are finite")
    return numbers


def distance(path: str, wanted: Sequence[float], given: Sequence[float]) -> float:
    """Return how far an answer is from another: of vectors 1 - cosine, else the largest difference.

    Infinite if they have not the same number of numbers, or a vector has no direction.
    """
    if len(wanted) != len(given):
        return math.inf
    if path != VECTORS:
        return max(abs(one - other) for one, other in zip(wanted, given, strict=True))
    length = math.hypot(*wanted) * math.hypot(*given)
    if not length:
        return math.inf
    dot = math.fsum(one * other for one, other in zip(wanted, given, strict=True))
    return max(0.0, 1 - dot / length)


def reference_of(path: str, text: str) -> tuple[float, ...]:
    """Return the reference's numbers in its recorded answer; () if it kept none, as for labels."""
    try:
        if path == VECTORS:
            return tuple(map(float, unpacked(text)))
        return tuple(map(float, text.split())) if path == SCORES else ()
    except ValueError:
        return ()


def room_of(path: str, answers: Sequence[tuple[Sequence[float], Sequence[float]]]) -> float:
    """Return how far answers at a path may move, from pairs of an answer and its reference.

    Twice the largest move, which of 1 - cosine is four times, within limits. A reference whose
    numbers mean something else (logits for probabilities) is further away than any rounding, so
    that the least room remains, as where there is no reference.
    """
    if path == VECTORS:
        least, most, times = _LEAST[path], _MOST[path], 4.0
    else:
        scale = max(1.0, *(abs(number) for own, _ in answers for number in own))
        least, most, times = _LEAST_PART * scale, _MOST_PART * scale, 2.0
    moves = [times * distance(path, own, other) for own, other in answers if other]
    moves = [move for move in moves if move <= most]
    return float(f"{max([least, *moves]):.3g}")
