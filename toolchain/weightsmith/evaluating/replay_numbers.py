"""Replay sets of models that do not chat: numbers in place of tokens, and how far they may move.

Two machines each give what the float32 reference gives, moved by rounding to the served weights and
in their own arithmetic. By the triangle inequality, they part by no more than twice the largest
such move, which the build saw on the questions themselves. docs/reference/replay.md has the rule.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median

from weightsmith.core.values import Json
from weightsmith.core.vectors import unpacked

VECTORS, SCORES, LABELS, TOKENS = "/v1/embeddings", "/v1/rerank", "/classify", "/pooling"
PATHS = (VECTORS, SCORES, LABELS, TOKENS)
MOST = 1 << 17
"""Numbers of a set: the program in images reads no more values than 200,000."""
DIGITS = 5
"""Significant ones that a set keeps."""
_LEAST_TURN, _MOST_TURN = 2e-4, 0.05
"""Room of vectors, of 1 - cosine: angles of 1.1 and 18 degrees."""
_LEAST_PART, _MOST_PART = 0.01, 0.25
"""Room of other numbers: of the largest number of a set, or of 1 if that is smaller. Probabilities
of three small classifiers in bfloat16 moved by up to 0.0014, and as far from AVX-512 to AVX2."""
_UNKNOWN_PART = 0.03
"""The same where the reference does not say how far the image's numbers are from it."""


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
        if any(isinstance(number, bool) for number in found):
            raise TypeError("no number")
        numbers = tuple(float(f"{number:.{DIGITS}g}") for number in found)
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError):
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
    own, other = math.hypot(*wanted), math.hypot(*given)
    if not own or not other or not math.isfinite(own + other):
        return math.inf
    dot = math.fsum(a / own * (b / other) for a, b in zip(wanted, given, strict=True))
    return max(0.0, 1 - dot)


def reference_of(path: str, text: str) -> tuple[float, ...]:
    """Return the reference's numbers in its recorded answer; () if it kept none."""
    try:
        return tuple(map(float, unpacked(text) if path == VECTORS else text.split()))
    except ValueError:
        return ()


def room_of(path: str, answers: Sequence[tuple[Sequence[float], Sequence[float]]]) -> float:
    """Return how far answers at a path may move, from pairs of an answer and its reference.

    Twice the largest move, which of 1 - cosine is four times, within limits. The reference's scores
    are logits, and a server's may be their sigmoid. Where most answers are further away than any
    rounding, the reference's numbers mean something else, and say nothing.
    """
    known = [(own, other) for own, other in answers if len(own) == len(other)]
    if path == VECTORS:
        moves = [4 * distance(path, own, other) for own, other in known]
        moves = [move for move in moves if math.isfinite(move)]
        return _within(_LEAST_TURN, max(moves, default=0.0), _MOST_TURN)
    scale = max(1.0, *(abs(number) for own, _ in answers for number in own))
    readings = (float, _sigmoid) if path == SCORES else (float,)
    moves = min(
        (
            [2 * distance(path, own, [*map(read, other)]) for own, other in known]
            for read in readings
        ),
        key=lambda found: max(found, default=0.0),
    )
    if not moves or median(moves) > _MOST_PART * scale:
        return _within(0.0, _UNKNOWN_PART * scale, math.inf)
    return _within(_LEAST_PART * scale, max(moves), _MOST_PART * scale)


def _within(least: float, room: float, most: float) -> float:
    return float(f"{min(most, max(least, room)):.3g}")


def _sigmoid(logit: float) -> float:
    return 0.5 + 0.5 * math.tanh(logit / 2)
