"""How long the stages that run the model will take, from the measured time of one of its layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

from weightsmith.checkpoints.shape import ModelShape
from weightsmith.errors import InputRefused
from weightsmith.evaluating.asking import walk_of as walk_of_task
from weightsmith.evaluating.results import RecipeTask
from weightsmith.evaluating.task import Task
from weightsmith.evaluating.walks import walk_of, walks
from weightsmith.forward.memory import Walk, batch_bytes, beside, token_bytes
from weightsmith.job_inputs import Input
from weightsmith.jobs import LayerTimeJob
from weightsmith.json_objects import JsonObject
from weightsmith.planning.memory import PADDED, PROBED_TOKENS, PROBES, asked_before_merging
from weightsmith.time_limits import job_seconds
from weightsmith.tools import Tools
from weightsmith.values import Json, Sources

_COUNTS = (8, 256)
"""Tokens in one pass: a step of a few answers, and texts that are read."""
NEW, FEW_NEW, LARGE = 16, 4, 10_000_000_000
"""Tokens that validation generates after each probe, and fewer for a model with so many weights, as
in `validating/greedy.py`, which imports torch."""
_BUILDER = "merge"


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTime(JsonObject):
    """Seconds of one decoder layer and of the head, for two counts of tokens."""

    layers: int
    counts: tuple[int, ...]
    layer: tuple[float, ...]
    head: tuple[float, ...]

    def passed(self, tokens: float, positions: float) -> float:
        """Return the seconds of a pass over all layers, with logits at some positions."""
        return self.layers * self._at(self.layer, tokens) + self._at(self.head, positions)

    def _at(self, seconds: Sequence[float], tokens: float) -> float:
        """Return the seconds for a number of tokens, on the line through both measurements."""
        few, many = self.counts
        slope = max(0.0, (seconds[1] - seconds[0]) / (many - few))
        return max(0.0, seconds[0] - slope * few) + slope * tokens


def measured_layer_time(sources: Sources, tools: Tools) -> LayerTime:
    """Run the job that measures a layer of the base's shapes on this machine."""
    base = sources.base.tree
    tools.runner.prepare(_BUILDER, tools.progress)
    with tools.scratch() as folder:
        job = LayerTimeJob(
            builder=_BUILDER,
            model=Input.tree(base),
            counts=_COUNTS,
            output=folder,
            memory_bytes=(4 << 30) + base.weight_bytes // 4,
            seconds=job_seconds(base.weight_bytes),
            use_gpu=True,
        )
        return LayerTime.from_json(tools.runner.run(job, tools.progress))


def stage_seconds(
    layer_time: LayerTime,
    shape: ModelShape,
    sources: Sources,
    tasks: Sequence[RecipeTask],
    quality_tokens: int,
    budget: int,
) -> Mapping[str, float]:
    """Return the seconds of each stage that runs the model, if no result is cached."""
    merged = bool(sources.adapters)
    probed = 3 * PROBED_TOKENS
    weights = sources.base.tree.weight_bytes // 2  # in 16 bits
    new = FEW_NEW if weights > LARGE else NEW
    walked = _walked(shape, sources, tasks, budget)
    validate = new * layer_time.passed(PROBES, PROBES) + layer_time.passed(probed, probed)
    read = PADDED * quality_tokens
    return {
        "validate": validate if merged else 0.0,
        "reference": sum(_answers(layer_time, shape, *each, budget) for each in walked)
        + (sum(_checked(layer_time, one.task) for one in tasks) if merged else 0.0),
        "quality": 2 * layer_time.passed(read, quality_tokens),
        # As if no draft were right, and without what it takes to dequantize the weights.
        "dequantized": sum(
            _answers(layer_time, shape, walk_of_task(one.task), one.task, budget) for one in tasks
        ),
    }


def _steps(task: Task) -> int:
    return len(task.items) * max(1, task.max_tokens)


def _walked(
    shape: ModelShape, sources: Sources, tasks: Sequence[RecipeTask], budget: int
) -> list[tuple[Walk, Task]]:
    """Return each walk of base and adapters, with the task that it takes the most steps for."""
    groups = walks(asked_before_merging(sources, tasks), shape, budget)
    return [
        (reduce(beside, map(walk_of, group)), max((u[0].task for u in group), key=_steps))
        for group in groups
    ]


def _checked(layer_time: LayerTime, task: Task) -> float:
    """Return the seconds of the merged model, which reads the adapter's answers in one pass."""
    return layer_time.passed(walk_of_task(task).tokens, _steps(task))


def _answers(
    layer_time: LayerTime, shape: ModelShape, walk: Walk, task: Task, budget: int
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


def with_times(
    rows: Sequence[Mapping[str, Json]], seconds: Callable[[], Mapping[str, float]]
) -> list[dict[str, Json]]:
    """Return a forecast's rows with `seconds`, null where a stage does not run the model."""
    try:
        found = seconds()
    except InputRefused:  # the dimensions are not known
        found = {}
    times = {stage: round(value, 1) for stage, value in found.items()}
    return [{**row, "seconds": None if row["cached"] else times.get(row["stage"])} for row in rows]
