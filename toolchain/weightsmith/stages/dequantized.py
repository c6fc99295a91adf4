"""Artifact -> scores of its weights: transformers answers where no image can be started."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from weightsmith.core.job_inputs import Input, Virtual
from weightsmith.core.jobs import DequantizedJob
from weightsmith.core.platforms import host_platform
from weightsmith.core.resources import builder_pins
from weightsmith.core.time_limits import job_seconds
from weightsmith.core.values import Artifact, Checkpoint, Digest, Format, JsonValue, StageInputs
from weightsmith.evaluating.results import RecipeTask, Result, judged, require
from weightsmith.evaluating.task import Answers, Task, score_task
from weightsmith.evaluating.walks import answer_seconds, batch_memory, memory_limit, task_walk
from weightsmith.forward.memory import DEQUANTIZED, LayerTime, model_walk_bytes
from weightsmith.models.facts import ModelFacts
from weightsmith.quantizers import formats, of_format
from weightsmith.serving.plan import ServingConfig, ServingPlan
from weightsmith.steps.bases import base_reference, platforms_of
from weightsmith.steps.destinations import InStore
from weightsmith.steps.launch import missing_device
from weightsmith.steps.stage_result import StageResult, Timer, unrecorded
from weightsmith.steps.step import (
    NOT_YET,
    Foreseen,
    ForeseenWeights,
    Foresight,
    Results,
    State,
    Step,
    TargetStep,
    Trial,
)
from weightsmith.steps.tools import JobMemory, Tools

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
) -> StageResult[tuple[Result, ...]]:
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
) -> Mapping[str, JsonValue]:
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
        batch_bytes=batch_memory(model, task_walk(task), tools.memory.budget),
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


def dequantized_memory(model: ModelFacts, tasks: Sequence[RecipeTask], memory: JobMemory) -> int:
    """Return the peak in bytes of the dequantized weights' answers, of the largest task."""
    walks = (task_walk(one.task) for one in tasks)
    return max(model_walk_bytes(model, walk, memory.budget) for walk in walks) + DEQUANTIZED


@dataclass(frozen=True, eq=False, kw_only=True)
class DequantizedStep(TargetStep[Trial, None]):
    """Asks the dequantized weights where no image could be started; then judges the answers."""

    name = "dequantized"
    proves = True
    recipe_number = RECIPE_NUMBER
    way_out = "set evaluate.limit to ask fewer questions"

    checkpoint: Step[Checkpoint, ForeseenWeights]
    weights: Step[Artifact, ForeseenWeights]
    config: Step[ServingConfig, ServingPlan]
    trial: Step[Trial, None]
    tasks: tuple[RecipeTask, ...]

    def foresee(self, seen: Foresight) -> Foreseen[None]:
        """Return its row, if this machine will not start the image."""
        format_ = self.of.target.format
        known = not format_.packed or format_.name in formats()
        if not self.tasks or not known or not can_answer(format_):
            return Foreseen(value=None)
        device = seen[self.config].device
        if not (why := self._why_not_started(device, seen.tools)):
            return Foreseen(value=None)
        checkpoint, weights = seen[self.checkpoint], seen[self.weights]
        state = State(cached=False, why=f"{why}; {NOT_YET}")
        if checkpoint.tree and weights.tree:
            digests = checkpoint.tree.digest, weights.tree.digest
            keys = [inputs(*digests, one.task).key for one in self.tasks]
            cached = all(seen.tools.store.find(key) for key in keys)
            state = State(cached=cached, why="" if cached else why)
        memory = dequantized_memory(checkpoint.model, self.tasks, seen.tools.memory)
        row = self.row(state, read=weights.weight_bytes, memory=memory)
        return Foreseen(value=None, rows=(row,))

    def _why_not_started(self, device: str, tools: Tools) -> str:
        """Return why this machine will not start the target's image; "" if it will.

        If the platforms are not known yet, this machine's is taken for one of them.
        """
        base = base_reference(self.of.target.engine, device, self.file.recipe.image.base)
        platforms = platforms_of(self.file, base)
        if platforms and host_platform() not in platforms:
            return f"its image, for {' and '.join(platforms)}, cannot be started here"
        missing = missing_device(device, tools)
        return f"its image is {missing}" if missing else ""

    def run(self, have: Results, tools: Tools) -> StageResult[Trial]:
        """Return the tasks with all scores; those of an image that was started stay as they are."""
        trial, weights = have[self.trial], have[self.weights]
        if trial.started or not trial.results or not can_answer(weights.format):
            return unrecorded(trial)
        asked = dequantized(have[self.checkpoint], weights, trial.results, tools)
        return StageResult(
            stage=asked.stage,
            value=replace(trial, results=asked.value),
            cached=asked.cached,
            seconds=asked.seconds,
        )

    def judge(self, have: Results) -> None:
        """Raise CheckFailed if a score dropped too much, or a task that must be proven is not."""
        require(have[self].results, tested=True)

    def seconds(self, layer: LayerTime, seen: Foresight) -> float | None:
        """Return how long all answers take, as if no draft were right."""
        shape, budget = seen[self.checkpoint].model.shape, seen.tools.memory.budget
        return sum(
            answer_seconds(layer, shape, task_walk(one.task), one.task, budget)
            for one in self.tasks
        )
