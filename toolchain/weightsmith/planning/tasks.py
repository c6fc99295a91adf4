"""The recipe's tasks and probes, read and checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from weightsmith.errors import InputRefused
from weightsmith.evaluating.items import read_items, read_prompts
from weightsmith.evaluating.leaks import describe, find_leaks
from weightsmith.evaluating.metrics import check_metric
from weightsmith.evaluating.results import RecipeTask
from weightsmith.evaluating.task import Task
from weightsmith.ports import Progress
from weightsmith.recipe import Evaluate
from weightsmith.recipe_file import RecipeFile


def tasks_of(file: RecipeFile) -> tuple[RecipeTask, ...]:
    """Return the recipe's task and each adapter's own; () without any. Raises UsageError."""
    recipe = file.recipe
    sections: list[tuple[int | None, str, Evaluate | None]] = [(None, "", recipe.evaluate)]
    sections += [
        (number, f"{_short(adapter.source)} {adapter.version}".strip(), adapter.evaluate)
        for number, adapter in enumerate(recipe.adapters)
    ]
    return tuple(
        RecipeTask(task=_task(file, name, wanted), settings=wanted, adapter=number)
        for number, name, wanted in sections
        if wanted is not None
    )


def _short(source: str) -> str:
    """Return the last part of a source's name."""
    return source.rstrip("/").rpartition("/")[2] or source


def _task(file: RecipeFile, name: str, wanted: Evaluate) -> Task:
    items = read_items(file.folder / wanted.data)
    check_metric(wanted.metric, items)
    return Task(
        items=items,
        metric=wanted.metric,
        max_tokens=wanted.max_tokens,
        command=wanted.command,
        name=name,
    )


def check_leaks(file: RecipeFile, tasks: tuple[RecipeTask, ...], progress: Progress) -> None:
    """Warn of questions that stand in the recipe's training or calibration text.

    Raises InputRefused instead where the task is strict.
    """
    calibration = file.recipe.calibration
    for task in tasks:
        for other in (task.settings.training, calibration.data if calibration else ""):
            if not other:
                continue
            leaks = describe(find_leaks(task.task.items, file.folder / other))
            if leaks and task.settings.strict:
                raise InputRefused(leaks, hint="remove them from either file")
            if leaks:
                progress.warn(leaks)


def probes(file: RecipeFile) -> tuple[Sequence[Mapping[str, str]], ...]:
    """Return the chats that validation probes with; () for the built-in ones. Raises UsageError."""
    wanted, questions = file.recipe.validation, file.recipe.evaluate
    if wanted.probes:
        return read_prompts(file.folder / wanted.probes)
    return tuple(i.messages for i in read_items(file.folder / questions.data)) if questions else ()
