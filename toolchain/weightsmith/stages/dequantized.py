"""Artifact -> scores of its weights: transformers answers where no image can be started."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from pathlib import Path

from weightsmith.core.jobs import DequantizedJob, DequantizedTask, Input, Virtual
from weightsmith.core.platforms import host_platform
from weightsmith.core.resources import builder_pins
from weightsmith.core.time_limits import job_seconds
from weightsmith.core.values import (
    AdapterSnapshot,
    Artifact,
    Checkpoint,
    Digest,
    Format,
    JsonValue,
    Score,
    Sources,
    StageInputs,
)
from weightsmith.evaluating.results import RecipeTask, Result, require, scored
from weightsmith.evaluating.task import Task, score_task
from weightsmith.evaluating.walks import answer_seconds, batch_memory, memory_limit, task_walk
from weightsmith.forward.memory import DEQUANTIZED, LayerTime, joint_walk, model_walk_bytes
from weightsmith.quantizers import formats, of_format
from weightsmith.serving.plan import ServingConfig, ServingPlan
from weightsmith.steps.bases import base_reference, platforms_of
from weightsmith.steps.destinations import InStore, StoredDocument
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
from weightsmith.steps.tools import Tools

BUILDER = "merge"
RECIPE_NUMBER = 3
_ANSWERS = "answers.json"
_BLIND: Mapping[str, JsonValue] = {
    "skipped": "the questions have pictures, and a vision tower is not dequantized"
}


def _can_answer(format_: Format) -> bool:
    """Return whether a format's weights are other than the checkpoint's, and can be read."""
    return format_.packed and of_format(format_.name).view is not None


def inputs(
    checkpoint: Digest, artifact: Digest, task: Task, adapters: Sequence[AdapterSnapshot] = ()
) -> StageInputs:
    """Return everything that the answers depend on: no platform, so that none is asked again.

    `adapters` are applied to the artifact's weights, unmerged.
    """
    unmerged = [one.snapshot.digest for one in adapters]
    return StageInputs(
        stage="dequantized",
        recipe_number=RECIPE_NUMBER,
        inputs={
            "checkpoint": checkpoint,
            "artifact": artifact,
            "questions": task.digest,
            "max_tokens": task.max_tokens,
            "builder": builder_pins(BUILDER),
            **({"adapters": unmerged} if unmerged else {}),
        },
    )


@dataclass(frozen=True, slots=True)
class _AskedSuite:
    """A suite, and the adapters that answer it unmerged."""

    result: Result
    adapters: tuple[AdapterSnapshot, ...]

    @property
    def task(self) -> Task:
        return self.result.task.task


def _task(asked: _AskedSuite, adapters: Sequence[AdapterSnapshot]) -> DequantizedTask:
    result, task = asked.result, asked.task
    # The answers of the merged model, or of what it was compared with.
    known = next(who for who in ("merged", "adapter", "base") if who in result.scores)
    rows = result.scores[known].per_item
    drafts = tuple(str(row.get("raw", row.get("answer", ""))) for row in rows)
    if task.metric == "choice" or len(rows) != len(task.items):  # a command chooses its own rows
        drafts = ()
    return DequantizedTask(
        questions=task.questions,
        max_tokens=task.max_tokens,
        choose=task.metric == "choice",
        drafts=drafts,
        adapters=tuple(adapters.index(one) for one in asked.adapters),
    )


def _run(
    checkpoint: Checkpoint,
    artifact: Artifact,
    asked: Sequence[_AskedSuite],
    tools: Tools,
    folder: Path,
) -> Sequence[Mapping[str, JsonValue]]:
    """Ask all of these tasks in one job; return what is kept of each."""
    tools.runner.prepare(BUILDER, tools.progress)
    size, model = checkpoint.tree.size, checkpoint.tree.texts
    walk = reduce(joint_walk, (task_walk(one.task) for one in asked))
    adapters = list({a.snapshot.digest: a for one in asked for a in one.adapters}.values())
    job = DequantizedJob(
        builder=BUILDER,
        model=Input.checkpoint(checkpoint),
        virtual=Virtual.of(checkpoint),
        artifact=Input.tree(artifact.tree),
        quantizer=of_format(artifact.format.name).name,
        adapters=tuple(Input.tree(one.snapshot.tree) for one in adapters),
        tasks=tuple(_task(one, adapters) for one in asked),
        batch_bytes=batch_memory(model, walk, tools.memory.budget),
        output=folder,
        memory_bytes=memory_limit(size),
        seconds=job_seconds(size, tokens=sum(one.task.most_tokens for one in asked)),
        use_gpu=True,
    )
    reply = tools.runner.run(job, tools.progress)
    if "skipped" in reply:
        return [reply] * len(asked)
    return [{"answers": rows} for rows in reply["answers"]]


def _answers(
    checkpoint: Checkpoint, artifact: Artifact, asked: Sequence[_AskedSuite], tools: Tools
) -> list[StoredDocument]:
    """Return what is stored for each task; one job answers all that have nothing yet."""
    to, made = InStore(tools.store), dict[int, Mapping[str, JsonValue]]()
    digests = checkpoint.digest, artifact.digest
    keys = [partial(inputs, *digests, one.task, one.adapters) for one in asked]
    missing = [number for number, key in enumerate(keys) if not to.find(key)]

    made |= {n: _BLIND for n in missing if asked[n].task.pictures}

    def stored(number: int, folder: Path) -> Mapping[str, JsonValue]:
        if number not in made:
            left = [n for n in missing if n >= number and n not in made]
            found = _run(checkpoint, artifact, [asked[n] for n in left], tools, folder)
            made.update(zip(left, found, strict=True))
        return made[number]

    return [to.document(key, _ANSWERS, partial(stored, n)) for n, key in enumerate(keys)]


@dataclass(frozen=True, eq=False, kw_only=True)
class DequantizedStep(TargetStep[Trial, None]):
    """Asks the dequantized weights where no image could be started; then judges the answers."""

    name = "dequantized"
    proves = True
    asks = True
    recipe_number = RECIPE_NUMBER
    way_out = "set evaluate.limit to ask fewer questions"

    sources: Step[Sources, Sources]
    checkpoint: Step[Checkpoint, ForeseenWeights]
    weights: Step[Artifact, ForeseenWeights]
    """Without the adapters that lie beside them."""
    config: Step[ServingConfig, ServingPlan]
    trial: Step[Trial, None]
    tasks: tuple[RecipeTask, ...]

    def foresee(self, seen: Foresight) -> Foreseen[None]:
        """Return its row, if this machine will not start the image."""
        format_ = self.of.target.format.without_adapters
        known = not format_.packed or format_.name in formats()
        tasks = [one for one in self.tasks if not one.task.pooled]
        if not tasks or not known or not _can_answer(format_):
            return Foreseen(value=None)
        device = seen[self.config].device
        base = base_reference(self.of.target.engine, device, self.file.recipe.image.base)
        # If the platforms are not known yet, this machine's is taken for one of them.
        platforms = platforms_of(self.file, base)
        if platforms and host_platform() not in platforms:
            why = f"its image, for {' and '.join(platforms)}, cannot be started here"
        elif missing := missing_device(device, seen.tools):
            why = f"its image is {missing}"
        else:
            return Foreseen(value=None)
        checkpoint, weights = seen[self.checkpoint], seen[self.weights]
        state = State(cached=False, why=f"{why}; {NOT_YET}")
        if checkpoint.tree and weights.tree:
            digests = checkpoint.tree.digest, weights.tree.digest
            sources = seen[self.sources]
            keys = [inputs(*digests, one.task, self._unmerged(one, sources)).key for one in tasks]
            cached = all(seen.tools.store.find(key) for key in keys)
            state = State(cached=cached, why="" if cached else why)
        walks, budget = (task_walk(one.task) for one in tasks), seen.tools.memory.budget
        peak = max(model_walk_bytes(checkpoint.model, walk, budget) for walk in walks)
        row = self.row(state, read=weights.weight_bytes, memory=peak + DEQUANTIZED)
        return Foreseen(value=None, rows=(row,))

    def run(self, have: Results, tools: Tools) -> StageResult[Trial]:
        """Return the tasks with all scores; those of an image that was started stay as they are.

        They are the image's weights, but not its engine: what that adds is not seen. Warns and
        leaves a task as it is if the weights of an architecture cannot be dequantized.
        """
        trial, checkpoint, weights = have[self.trial], have[self.checkpoint], have[self.weights]
        asked = [result for result in trial.results if not result.task.task.pooled]
        if trial.started or not asked or not _can_answer(weights.format):
            return unrecorded(trial)
        count = sum(len(result.task.task.items) for result in asked)
        timer = Timer(self.name, f"{count} questions to the dequantized weights", tools)
        cached, scores = True, list[Score | None]()
        sources = have[self.sources]
        questions = [_AskedSuite(one, self._unmerged(one.task, sources)) for one in asked]
        found = iter(_answers(checkpoint, weights, questions, tools))
        for result in trial.results:
            task = result.task.task
            if task.pooled:  # a network with another head, of which no weights are dequantized
                scores.append(None)
                continue
            one = next(found)
            cached = cached and one.cached
            if why := one.value.get("skipped"):
                tools.progress.warn(f"the dequantized weights were not asked: {why}")
                scores.append(None)
            else:
                answers = task.answers_of(one.value["answers"])
                scores.append(score_task(task, answers, tools.command))
        results = scored(trial.results, self.name, scores)
        return timer.done(replace(trial, results=results), cached=cached)

    def _unmerged(self, task: RecipeTask, sources: Sources) -> tuple[AdapterSnapshot, ...]:
        """Return the adapters that the image would add to its weights; () for merged ones."""
        if not self.of.target.format.unmerged:
            return ()
        return sources.adapters if task.adapter is None else (sources.adapters[task.adapter],)

    def judge(self, have: Results) -> None:
        """Raise CheckFailed if a score dropped too much, or a task that must be proven is not."""
        require(have[self].results, tested=True)

    def seconds(self, layer: LayerTime, seen: Foresight) -> float | None:
        """Return how long all answers take, as if no draft were right."""
        shape, budget = seen[self.checkpoint].model.shape, seen.tools.memory.budget
        return sum(
            answer_seconds(layer, shape, task_walk(one.task), one.task, budget)
            for one in self.tasks
            if not one.task.pooled
        )
