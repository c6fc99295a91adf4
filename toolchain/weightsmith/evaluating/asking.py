"""What a job that asks a task's questions in transformers holds in memory."""

from __future__ import annotations

from pathlib import Path

from weightsmith.core.errors import InputRefused
from weightsmith.evaluating.task import Task
from weightsmith.forward.memory import WalkSize, batch_bytes
from weightsmith.models.facts import read_facts

LETTERS = 3
"""Of a token, about."""
_TEMPLATE_TOKENS = 32


def memory_limit(size: int) -> int:
    """Return the memory in bytes that a job may use for models of `size` bytes together.

    A model that cannot be walked is loaded whole, in float32.
    """
    return (3 << 30) + 5 * size


def walk_of(task: Task, *, views: int = 1, adapter_bytes: int = 0) -> WalkSize:
    """Return what runs side by side when so many models are asked a task."""
    one_by_one = task.metric == "choice"
    return WalkSize(
        views=views,
        rows=1 if one_by_one else len(task.items),
        tokens=_longest(task) if one_by_one else _tokens(task.most_tokens, len(task.items), task),
        adapter_bytes=adapter_bytes,
    )


def batch_memory(model: Path, walk: WalkSize, budget: int) -> int:
    """Return a job's memory for batches in bytes; 0 if the model's dimensions are not known."""
    try:
        shape = read_facts(model).shape
    except InputRefused:
        return 0
    return batch_bytes(shape, walk, budget)


def _longest(task: Task) -> int:
    """Return the tokens of the longest question with its longest choice."""
    letters = (
        sum(len(str(m["content"])) for m in item.messages) + max(map(len, item.choices), default=0)
        for item in task.items
    )
    return _tokens(max(letters, default=0), 1, task)


def _tokens(letters: int, items: int, task: Task) -> int:
    # A chat template adds some tokens.
    return letters // LETTERS + items * (_TEMPLATE_TOKENS + task.max_tokens)
