"""The tasks of a recipe: read and checked, and with their scores and verdicts."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

from weightsmith.core.errors import CheckFailed, InputRefused
from weightsmith.core.ports import Progress
from weightsmith.core.values import Json, JsonValue, Score, Scores
from weightsmith.evaluating.build_record import DifferenceRecord, SamenessRecord
from weightsmith.evaluating.contamination import describe, find_contamination
from weightsmith.evaluating.gate import (
    DropLimit,
    Verdict,
    inconclusive_reasons,
    judge_drop,
    sampled,
)
from weightsmith.evaluating.items import read_items, read_prompts, sample
from weightsmith.evaluating.metrics import check_metric
from weightsmith.evaluating.task import Task
from weightsmith.recipe.file import RecipeFile
from weightsmith.recipe.schema import Evaluate

NOT_PROVEN = "not proven"
"""The verdict on an image that was published although its gates could not have failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeTask:
    """A task of a build, its reference, and the allowed drop."""

    task: Task
    settings: Evaluate
    of: int = 0
    """Number of questions in the data, if only a sample of them is asked."""
    adapter: int | None = None
    """Index of the adapter whose task it is; None for all adapters together."""

    @property
    def limit(self) -> DropLimit:
        """The allowed drop of merged model and image."""
        return DropLimit(max_drop=self.settings.max_drop, min_score=self.settings.min_score)


def tasks_of(file: RecipeFile) -> tuple[RecipeTask, ...]:
    """Return the recipe's task and those of its adapters, () if none; raises UsageError."""
    recipe, found = file.recipe, []
    if recipe.evaluate is not None:
        found.append(task_of(file, recipe.evaluate))
    for number, adapter in enumerate(recipe.adapters):
        if adapter.evaluate is not None:
            short = adapter.source.rstrip("/").rpartition("/")[2] or adapter.source
            name = f"{short} {adapter.version}".strip()
            found.append(task_of(file, adapter.evaluate, name, number))
    return tuple(found)


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A task's scores and verdicts."""

    task: RecipeTask
    scores: Scores
    """Subject -> score; subjects are `base`, `adapter` (unmerged), `merged`, `image`, and, where
    no image was started, `dequantized`: its weights in transformers."""
    verdicts: tuple[Verdict, ...] = ()
    not_started: str = ""
    """What the image is for that the building machine is not or has not."""

    def scored(self, subject: str, score: Score) -> Result:
        """Return it with another subject's score, compared with the adapter's, or the base's."""
        against = "adapter" if "adapter" in self.scores else "base"
        verdict = judged(self.task, subject, score, against, self.scores[against], self.task.limit)
        scores = {**self.scores, subject: score}
        return replace(self, scores=scores, verdicts=(*self.verdicts, verdict))

    def require(self) -> None:
        """Raise CheckFailed with the first verdict that failed."""
        for verdict in self.verdicts:
            verdict.require()

    @property
    def reference(self) -> Score | None:
        """The score that others are compared with: the adapter's, or the base's without one."""
        return self.scores.get("adapter", self.scores.get("base"))

    @property
    def ends(self) -> int:
        """Number of the reference's answers that ended by themselves."""
        rows = self.reference.per_item if self.reference else ()
        return sum(row.get("finish_reason") == "stop" for row in rows)

    @property
    def sameness(self) -> Mapping[str, SamenessRecord]:
        """How many answers of all that was made are the reference's to the letter."""
        return sameness(self.scores)

    @property
    def unproven(self) -> tuple[str, ...]:
        """Why passing the gate shows nothing; () if it shows that at most `max_drop` was lost."""
        missing = []
        if "image" not in self.scores:
            missing.append("the image was not asked")
            if self.not_started:
                missing[0] += f", since it is {self.not_started}"
            if "dequantized" in self.scores:
                missing[0] += "; its dequantized weights were, in transformers"
        return tuple(named(self.task, text) for text in (*missing, *self.inconclusive_reasons))

    @property
    def inconclusive_reasons(self) -> tuple[str, ...]:
        """The same for the subjects that were asked so far."""
        return inconclusive_reasons(self.scores, self.task.limit)


def require(results: Sequence[Result], *, tested: bool) -> None:
    """Raise CheckFailed if a score dropped too much, or a task that must be proven is not.

    `tested`: the image was to be asked by now.
    """
    for result in results:
        result.require()
    for result in results:
        if result.task.settings.require != "proven":
            continue
        if reasons := result.unproven if tested else result.inconclusive_reasons:
            raise CheckFailed(
                f"not proven: {reasons[0]}",
                hint="ask more or harder questions, train the adapter further, or set"
                " evaluate.require: passed",
            )


def main_scores(results: Sequence[Result]) -> Scores:
    """Return the scores of the first task, which stand for a build where one line must do."""
    return results[0].scores if results else {}


def unproven_of(results: Sequence[Result]) -> tuple[str, ...]:
    """Return why passing a build's gates shows nothing; () if each shows what it should."""
    if not results:
        return ("the recipe has no `evaluate`",)
    return tuple(reason for result in results for reason in result.unproven)


def verdict_of(results: Sequence[Result]) -> str:
    """Return `passed`, or `not proven` if a build's gates could not have failed."""
    return NOT_PROVEN if unproven_of(results) else "passed"


def judged(
    task: RecipeTask, subject: str, now: Score, against: str, before: Score, limit: DropLimit
) -> Verdict:
    """Return whether a score is within its limit of another; the reason names the task."""
    verdict = judge_drop(subject, now, against, before, limit)
    return replace(verdict, reason=named(task, verdict.reason))


def named(task: RecipeTask, text: str) -> str:
    """Return the text with the task's name before it, if it has one."""
    return f"{task.task.name}: {text}" if task.task.name else text


def sameness(scores: Scores) -> Mapping[str, SamenessRecord]:
    """Return the sameness of all that was made, as far as they answered all questions."""
    reference = scores.get("adapter", scores.get("base"))
    found = {}
    for who in ("merged", "dequantized", "image"):
        rows = scores[who].per_item if who in scores else ()
        if not reference or not rows or len(reference.per_item) != len(rows):
            continue
        pairs = enumerate(zip(reference.per_item, rows, strict=True), start=1)
        compared = (_difference(number, *pair) for number, pair in pairs)
        others = tuple(one for one in compared if one)
        found[who] = SamenessRecord(
            share=round(1 - len(others) / len(rows), 6),
            same=len(rows) - len(others),
            n=len(rows),
            differences=others,
        )
    return found


def _difference(
    number: int, expected: Mapping[str, JsonValue], given: Mapping[str, JsonValue]
) -> DifferenceRecord | None:
    """Return where two answers part; None if they are equal but for white space around them.

    Detokenizers keep or drop the space before an answer's first word.
    """
    text, other = str(expected.get("answer", "")), str(given.get("answer", ""))
    if text.strip() == other.strip():
        return None
    skipped = len(text) - len(text.lstrip())
    pairs = zip(text.lstrip(), other.lstrip(), strict=False)
    same = skipped + sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    ends = [int(end) for end in _numbers(expected.get("token_ends"))]
    margins = _numbers(expected.get("margins"))
    place = bisect_right(ends, same)
    end = ends[place] if place < len(ends) else len(text)
    margin = margins[place] if place < len(margins) else None
    return DifferenceRecord(question=number, token=text[same:end], margin=margin)


def _numbers(given: Json) -> list[float]:
    """Return the numbers in a text; answers that were stored earlier have them in a list."""
    return [float(one) for one in (given.split() if isinstance(given, str) else given or ())]
