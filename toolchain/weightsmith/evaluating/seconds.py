"""How long answering a task takes, from the measured time of one layer."""

from __future__ import annotations

from weightsmith.evaluating.task import Task
from weightsmith.forward.measured_layer import LayerTime
from weightsmith.forward.memory import WalkSize, batch_bytes, token_bytes
from weightsmith.models.shape import ModelShape


def steps_of(task: Task) -> int:
    """Return how many tokens a model answers a task with, at most."""
    return len(task.items) * max(1, task.max_tokens)


def answer_seconds(
    layer_time: LayerTime, shape: ModelShape, walk: WalkSize, task: Task, budget: int
) -> float:
    """Return the seconds of models that answer side by side, token by token.

    A batch that does not fit into memory with the others reads the weights again.
    """
    rows, new = len(task.items), max(1, task.max_tokens)
    one = token_bytes(
        layers=shape.layers,
        cached=shape.kv_heads * shape.head_dim,
        hidden=shape.hidden,
        intermediate=shape.intermediate,
    )
    room = max(1, batch_bytes(shape, walk, budget))
    batches = max(1, -(-walk.views * walk.tokens * one // room))
    asked, steps = walk.views * walk.tokens / batches, walk.views * rows / batches
    return batches * (layer_time.passed(asked, steps) + new * layer_time.passed(steps, steps))
