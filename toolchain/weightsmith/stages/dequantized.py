"""Artifact -> scores of its weights: transformers answers where no image can be started."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from weightsmith.destinations import InStore
from weightsmith.evaluating.asking import batch_memory, memory_limit, walk_of
from weightsmith.evaluating.results import Result, judged
from weightsmith.evaluating.task import Answers, Task, score_task
from weightsmith.job_inputs import Input, Virtual
from weightsmith.jobs import DequantizedJob
from weightsmith.outcome import Outcome, Timer
from weightsmith.quantizers import of_format
from weightsmith.resources import builder_pins
from weightsmith.time_limits import job_seconds
from weightsmith.tools import Tools
from weightsmith.values import Artifact, Checkpoint, Digest, Format, Json, StageInputs

BUILDER = "merge"
RECIPE_NUMBER = 3
_ANSWERS = "answers.json"


def can_answer(format_: Format) -> bool:
    """Return whether a format's weights are other than the merged model's, and can be read."""
    return format_.packed and of_format(format_.name).view is not None


def inputs(checkpoint: Digest, artifact: Digest, task: Task) -> StageInputs:
    """Return everything that the answers depend on: no platform, so that none is asked again."""
    return StageInputs(
        stage="dequantized",
        recipe_number=RECIPE_NUMBER,
        inputs={
            "checkpoint": checkpoint,
            "artifact": artifact,
            "questions": task.digest,
            "max_tokens": task.max_tokens,
            "builder": builder_pins(BUILDER),
        },
    )


def dequantized(
    checkpoint: Checkpoint, artifact: Artifact, results: Sequence[Result], tools: Tools
) -> Outcome[tuple[Result, ...]]:
    """Return the tasks with the scores of the dequantized weights, in float32 in transformers.

    They are the image's weights, but not its engine: what that adds is not seen. Warns and leaves a
    task as it is if the weights of an architecture cannot be dequantized.
    """
    count = sum(len(result.task.task.items) for result in results)
    timer = Timer("dequantized", f"{count} questions to the dequantized weights", tools)
    to, cached, scored = InStore(tools.store), True, []
    for result in results:
        task = result.task.task
        found = to.document(
            partial(inputs, checkpoint.digest, artifact.digest, task),
            _ANSWERS,
            partial(_run, checkpoint, artifact, result, tools),
        )
        cached = cached and found.cached
        if why := found.value.get("skipped"):
            tools.progress.warn(f"the dequantized weights were not asked: {why}")
            scored.append(result)
        else:
            scored.append(_scored(result, task.answers_of(found.value["answers"]), tools))
    return timer.done(tuple(scored), cached=cached)


def _run(
    checkpoint: Checkpoint, artifact: Artifact, result: Result, tools: Tools, folder: Path
) -> Mapping[str, Json]:
    tools.runner.prepare(BUILDER, tools.progress)
    task, size, model = result.task.task, checkpoint.tree.size, checkpoint.tree.texts
    job = DequantizedJob(
        builder=BUILDER,
        model=Input.checkpoint(checkpoint),
        virtual=Virtual.of(checkpoint),
        artifact=Input.tree(artifact.tree),
        quantizer=of_format(artifact.format.name).name,
        questions=task.questions,
        max_tokens=task.max_tokens,
        choose=task.metric == "choice",
        drafts=_drafts(result),
        batch_bytes=batch_memory(model, walk_of(task), tools.memory.budget),
        output=folder,
        memory_bytes=memory_limit(size),
        seconds=job_seconds(size, tokens=task.most_tokens),
        use_gpu=True,
    )
    return tools.runner.run(job, tools.progress)


def _drafts(result: Result) -> tuple[str, ...]:
    """Return the answers of the merged model, or of what it was compared with; () for choices."""
    scores, task = result.scores, result.task.task
    known = next(scores[who] for who in ("merged", "adapter", "base") if who in scores)
    rows = known.per_item
    if task.metric == "choice" or len(rows) != len(task.items):  # a command chooses its own rows
        return ()
    return tuple(str(row.get("answer", "")) for row in rows)


def _scored(result: Result, answers: Answers, tools: Tools) -> Result:
    """Return a task with the score of the weights, compared with the adapter's, or the base's."""
    task, scores = result.task, dict(result.scores)
    score = score_task(task.task, answers, tools.command)
    against = "adapter" if "adapter" in scores else "base"
    verdict = judged(task, "dequantized", score, against, scores[against], task.limit)
    scores["dequantized"] = score
    return replace(result, scores=scores, verdicts=(*result.verdicts, verdict))
