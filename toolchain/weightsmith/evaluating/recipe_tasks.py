"""Reads and checks the recipe's tasks and probes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from weightsmith.core.errors import InputRefused
from weightsmith.core.ports import Progress
from weightsmith.evaluating.contamination import describe, find_contamination
from weightsmith.evaluating.inconclusive import sampled
from weightsmith.evaluating.items import read_items, read_prompts, sample
from weightsmith.evaluating.metrics import check_metric
from weightsmith.evaluating.results import RecipeTask, named
from weightsmith.evaluating.task import Task
from weightsmith.recipe.file import RecipeFile
from weightsmith.recipe.schema import Evaluate


def tasks_of(file: RecipeFile) -> tuple[RecipeTask, ...]:
    """Return the recipe's task and those of its adapters, () if none; raises UsageError."""
    recipe = file.recipe
    sections: list[tuple[int | None, str, Evaluate | None]] = [(None, "", recipe.evaluate)]
    sections += [
        (number, f"{_short(adapter.source)} {adapter.version}".strip(), adapter.evaluate)
        for number, adapter in enumerate(recipe.adapters)
    ]
    return tuple(
        task_of(file, settings, name, number)
        for number, name, settings in sections
        if settings is not None
    )


def _short(source: str) -> str:
    """Return the last part of a source's name."""
    return source.rstrip("/").rpartition("/")[2] or source


def task_of(
    file: RecipeFile, settings: Evaluate, name: str = "", adapter: int | None = None
) -> RecipeTask:
    """Return one task with its questions; raises UsageError."""
    everything = read_items(file.folder / settings.data)
    check_metric(settings.metric, everything)
    items = sample(everything, settings.limit)
    task = Task(
        items=items,
        metric=settings.metric,
        max_tokens=settings.max_tokens,
        command=settings.command,
        name=name,
    )
    of = len(everything) if len(items) < len(everything) else 0
    return RecipeTask(task=task, settings=settings, of=of, adapter=adapter)


def say_samples(tasks: tuple[RecipeTask, ...], progress: Progress) -> None:
    """Say what the samples of questions can show."""
    for task in tasks:
        if task.of:
            progress.note(named(task, sampled(len(task.task.items), task.of)))


def check_contamination(
    file: RecipeFile, tasks: tuple[RecipeTask, ...], progress: Progress
) -> None:
    """Warn about questions that appear in the recipe's training or calibration text.

    Raises InputRefused instead where the task is strict.
    """
    calibration = file.recipe.calibration
    for task in tasks:
        for other in (task.settings.training, calibration.data if calibration else ""):
            if not other:
                continue
            leaks = describe(find_contamination(task.task.items, file.folder / other))
            if leaks and task.settings.strict:
                raise InputRefused(leaks, hint="remove them from one of the two files")
            if leaks:
                progress.warn(leaks)


def probes(file: RecipeFile) -> tuple[Sequence[Mapping[str, str]], ...]:
    """Return the probe chats for validation, () for the built-in ones; raises UsageError."""
    options, questions = file.recipe.validation, file.recipe.evaluate
    if options.probes:
        return read_prompts(file.folder / options.probes)
    return tuple(i.messages for i in read_items(file.folder / questions.data)) if questions else ()
