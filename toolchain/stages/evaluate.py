"""Image -> scores: the task asked of the running server, and the gate that it must pass."""

from __future__ import annotations

from collections.abc import Sequence

from toolchain.evaluating.client import Limits, chat, check_served_name, wait_until_healthy
from toolchain.evaluating.items import Item, read_items
from toolchain.evaluating.metrics import check_metric, gate, score_answers, wilson
from toolchain.ports import Endpoint, Progress
from toolchain.values import Score

__all__ = [
    "Item",
    "check_metric",
    "gate",
    "read_items",
    "score_answers",
    "score_endpoint",
    "wait_until_healthy",
    "wilson",
]


def score_endpoint(
    endpoint: Endpoint,
    served_name: str,
    items: Sequence[Item],
    metric: str,
    max_tokens: int,
    progress: Progress,
    limits: Limits | None = None,
) -> Score:
    """Return the score of a running server, asked greedily and one question at a time.

    One at a time because batching changes the order of sums, and so an answer that is nearly a
    tie. Raises UsageError for a pattern that is none, CheckFailed for a server that fails.
    """
    check_metric(metric, items)
    check_served_name(endpoint, served_name, limits)
    answers = []
    for number, item in enumerate(items, start=1):
        answers.append(chat(endpoint, served_name, item, max_tokens, limits))
        progress.advance(number, len(items), "items")
    return score_answers(answers, items, metric)
