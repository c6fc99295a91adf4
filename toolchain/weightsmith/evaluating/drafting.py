"""Whether drafts pay: the same questions to a server with its drafts, and to one without them.

A share of accepted tokens does not say so: a step that judges drafted tokens takes longer than one
that makes a single token, and drafting takes time (Leviathan et al., Fast Inference from
Transformers via Speculative Decoding, ICML 2023, theorem 3.8). So both are measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from weightsmith.core.json_objects import JsonObject
from weightsmith.core.ports import Progress
from weightsmith.evaluating.acceptance import Drafted
from weightsmith.evaluating.client import Served
from weightsmith.evaluating.items import Item
from weightsmith.evaluating.load import measure_all
from weightsmith.evaluating.session import ServerSession

QUESTIONS = 16
"""At most so many of the build's are asked."""
_ROUNDS = 3
PAY, LOSE, NOT_SHOWN = "pay", "do not pay", "not shown"


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftSpeed(JsonObject):
    """Tokens per second with drafts and without them, of the same questions."""

    questions: int
    drafted: tuple[float, ...]
    """Of each round."""
    undrafted: tuple[float, ...]
    times: float
    """By how much drafts make it faster."""
    interval: tuple[float, float]
    """The slowest round with drafts against the fastest without, and the other way round."""
    verdict: str
    """`pay`, `do not pay`, or `not shown` if rounds differ more than the two do."""
    reason: str


def question_speeds(
    session: ServerSession,
    served: Served,
    questions: Sequence[Item],
    at_once: int,
    tokens: int,
    progress: Progress,
) -> tuple[float, ...]:
    """Return the tokens per second of a few rounds of the same questions.

    `tokens` is the most that an answer has. A first round, which fills caches, is not counted.
    Returns () if a question is not answered, and warns of it.
    """
    asked = session.adding({"stream_options": {"include_usage": True}})
    found = list[float]()
    for _ in range(_ROUNDS + 1):
        samples, seconds = measure_all(asked, served, questions, at_once, tokens, progress)
        if failed := next((one.error for one in samples if one.error), ""):
            progress.warn(f"bench: whether drafts pay cannot be measured: {failed}")
            return ()
        found.append(sum(one.tokens for one in samples) / seconds)
    return tuple(float(f"{one:.4g}") for one in found[1:])


def draft_speed(
    drafted: Sequence[float], undrafted: Sequence[float], questions: int, steps: Drafted | None
) -> DraftSpeed:
    """Return whether drafts pay, by the rounds of both; `steps` are the counters of the first."""
    times = median(drafted) / median(undrafted)
    low, high = min(drafted) / max(undrafted), max(drafted) / min(undrafted)
    verdict = PAY if low > 1 else LOSE if high < 1 else NOT_SHOWN
    said = (f"drafts {verdict}" if verdict != NOT_SHOWN else "whether drafts pay is not shown") + (
        f": {median(drafted):.3g} tokens per second with them, {median(undrafted):.3g} without,"
        f" {times:.2f} times ({low:.2f} to {high:.2f})"
    )
    if steps and steps.steps:
        each = 1 + steps.accepted / steps.steps
        said += (
            f"; a step with drafts takes {each / times:.2f} times as long as a token without, and"
            f" gives {each:.2f} tokens"
        )
    return DraftSpeed(
        questions=questions,
        drafted=tuple(drafted),
        undrafted=tuple(undrafted),
        times=round(times, 3),
        interval=(round(low, 3), round(high, 3)),
        verdict=verdict,
        reason=said,
    )
