"""The suites of a recipe: read and checked, and with their scores and verdicts.

Several suites are judged together: each by its own rule, and p values are adjusted by Holm's method
so that ten suites give no more false alarms and no more false proofs than one.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, takewhile
from pathlib import Path

from weightsmith.core.errors import CheckFailed, EnvironmentFailure, InputRefused, UsageError
from weightsmith.core.files import write_whole
from weightsmith.core.ports import Progress
from weightsmith.core.safe_parse import read_bytes
from weightsmith.core.values import Json, JsonValue, Score, Scores
from weightsmith.evaluating.build_record import DifferenceRecord, SamenessRecord
from weightsmith.evaluating.contamination import describe_contamination
from weightsmith.evaluating.gate import (
    Rule,
    Verdict,
    adjusted,
    chances,
    comparison_of,
    holm,
    inconclusive_reasons,
    judge_drop,
    reference_of,
    sampled,
)
from weightsmith.evaluating.items import Item, read_items, read_prompts, sample
from weightsmith.evaluating.metrics import check_metric
from weightsmith.evaluating.replay import EARLIER, LARGEST, ReplaySet, read_replay
from weightsmith.evaluating.task import Task, task_with
from weightsmith.recipe.file import RecipeFile
from weightsmith.recipe.schema import Recipe, Suite

NOT_PROVEN = "not proven"
"""The verdict on an image that was published although its gates could not have failed."""
_SERVED = frozenset({"dequantized", "image"})
_STEPS = {
    "adapter": "the adapter itself",
    "merged": "merging",
    "dequantized": "quantizing",
    "image": "quantizing and serving",
}
"""Subject -> what made it of the one before."""
_RETAIN = (
    "mix general examples into the training, train less, lower the adapter's weight, or allow more"
    " with max_drop"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeTask:
    """A suite of a build: its questions, its reference, and the allowed drop."""

    task: Task
    settings: Suite
    of: int = 0
    """Number of questions in the data, if only a sample of them is asked."""
    adapter: int | None = None
    """Index of the adapter whose suite it is; None for all adapters together."""

    @property
    def rule(self) -> Rule:
        """What merged model and image must keep to."""
        settings = self.settings
        if settings.is_bar:
            return Rule(max_drop=1.0, min_score=settings.min_score, against="")
        return Rule(
            max_drop=settings.allowed_drop,
            min_score=settings.min_score,
            against=settings.against,
        )


def tasks_of(file: RecipeFile) -> tuple[RecipeTask, ...]:
    """Return the suites of a recipe and of its adapters, () if none; raises UsageError."""
    recipe, found = file.recipe, _named_suites(file.recipe.evaluate)
    tasks = [task_of(file, suite, name) for name, suite in found.items()]
    for number, adapter in enumerate(recipe.adapters):
        short = adapter.source.rstrip("/").rpartition("/")[2] or adapter.source
        own = f"{short} {adapter.version}".strip()
        if any(task.task.name.startswith(own) for task in tasks):
            own = f"{own} ({number + 1})"
        for name, suite in _named_suites(adapter.evaluate).items():
            tasks.append(task_of(file, suite, f"{own} {name}".strip(), number))
    return tuple(tasks)


def _named_suites(suites: Sequence[Suite]) -> Mapping[str, Suite]:
    """Return suites by name: by default nothing for the only one, else its data file's name."""
    found: dict[str, Suite] = {}
    for suite in suites:
        name = suite.name or (Path(suite.data).stem if len(suites) > 1 else "")
        # Files of reports have these names, and some file systems and pages fold cases.
        if twin := next((one for one in found if one.casefold() == name.casefold()), None):
            both = name if twin == name else f"{twin} and {name}, which differ in case alone"
            raise UsageError(
                f"two suites of `evaluate` are called {both}", hint="give each its own `name`"
            )
        found[name] = suite
    return found


def task_of(
    file: RecipeFile, settings: Suite, name: str = "", adapter: int | None = None
) -> RecipeTask:
    """Return one suite with its questions; raises UsageError."""
    everything = read_items(file.folder / settings.data, settings.metric)
    check_metric(settings.metric, everything, settings.data)
    items = sample(everything, settings.limit)
    task = task_with(settings, items, settings.data, file.folder, name)
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
            leaks = describe_contamination(task.task.items, file.folder / other)
            if leaks and task.settings.strict:
                raise InputRefused(leaks, hint="remove them from one of the two files")
            if leaks:
                progress.warn(leaks)


def probes(file: RecipeFile) -> tuple[Sequence[Mapping[str, str]], ...]:
    """Return the probe chats for validation, () for the built-in ones; raises UsageError."""
    if probes := file.recipe.validation.probes:
        return read_prompts(file.folder / probes)
    suites = file.recipe.evaluate[:1]
    return tuple(
        i.messages
        for one in suites
        for i in read_items(file.folder / one.data, one.metric)
        if all(message["content"] for message in i.messages)  # pictures are left out
    )


def replay_items(file: RecipeFile) -> tuple[Item, ...]:
    """Return the questions that the recipe names for the replay set, () for none; UsageError."""
    if not (data := file.recipe.replay.data):
        return ()
    chats = read_prompts(file.folder / data)
    return tuple(Item(messages=one, expected=("",), line=0) for one in chats)


def earlier_replay(file: RecipeFile, target: str) -> ReplaySet | None:
    """Return the replay set beside a recipe, of an image that was made of it before; None for none.

    Raises InputRefused for a file that is no set.
    """
    name = file.path.stem if file.path else "recipe"
    for path in (file.folder / f"{name}{end}" for end in (f".{target}{EARLIER}", EARLIER)):
        if path.is_file():
            return read_replay(read_bytes(path, LARGEST), str(path))
    return None


def keep_replay(file: RecipeFile, target: str, made: ReplaySet) -> Path:
    """Write a target's replay set beside its recipe; return where. Raises EnvironmentFailure."""
    one, name = len(file.recipe.targets) == 1, file.path.stem if file.path else "recipe"
    path = file.folder / f"{name}{EARLIER if one else f'.{target}{EARLIER}'}"
    try:
        write_whole(path, made.data)
    except OSError as error:
        raise EnvironmentFailure(
            f"cannot write {path}: {error.strerror}", hint="make the recipe's folder writable"
        ) from None
    return path


def recipe_of_adapter(recipe: Recipe, number: int) -> Recipe:
    """Return the recipe of one adapter alone, with its own suites if it has any."""
    own = recipe.adapters[number]
    suites = own.evaluate or recipe.evaluate
    return recipe.changed(adapters=(own.changed(evaluate=()),), evaluate=suites)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A suite's scores and verdicts."""

    task: RecipeTask
    scores: Scores
    """Subject -> score; subjects are `base`, `adapter` (unmerged), `merged`, `image`, and, where
    no image was started, `dequantized`: its weights in transformers."""
    verdicts: tuple[Verdict, ...] = ()
    not_started: str = ""
    """What the image is for that the building machine is not or has not."""

    @property
    def reference(self) -> Score | None:
        """The score of what the image should be: base + adapter, or the base without one."""
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
    def failed(self) -> bool:
        """Whether a verdict that binds is not passed."""
        return any(one.binding and not one.passed for one in self.verdicts)


def of_adapter(results: Sequence[Result], number: int, recipe: Recipe) -> tuple[Result, ...]:
    """Return the suites that an adapter was asked alone, named as in a recipe of its own."""
    only = len(recipe.adapters) == 1
    own = [one for one in results if one.task.adapter == number]
    own = own or [one for one in results if only and one.task.adapter is None]
    names = _named_suites(recipe_of_adapter(recipe, number).evaluate)
    found = []
    for name, one in zip(names, own, strict=True):
        task = replace(one.task.task, name=name)
        found.append(replace(one, task=replace(one.task, task=task, adapter=None)))
    return tuple(found)


def scored(
    results: Sequence[Result], subject: str, scores: Sequence[Score | None]
) -> tuple[Result, ...]:
    """Return suites with a subject's scores, each judged by its rule; None leaves one as it is."""
    pairs = zip(results, scores, strict=True)
    now = [replace(r, scores={**r.scores, subject: s}) if s else r for r, s in pairs]
    compared: dict[int, float] = {}
    for place, one in enumerate(now):
        against = reference_of(one.task.rule.against, one.scores)
        if scores[place] and (c := comparison_of(one.scores[subject], one.scores.get(against))):
            compared[place] = c.p
    several = len(compared) > 1
    p = dict(zip(compared, holm(list(compared.values())), strict=True)) if several else {}
    return tuple(
        _judged(one, subject, p.get(place)) if scores[place] else one
        for place, one in enumerate(now)
    )


def _judged(one: Result, subject: str, p: float | None) -> Result:
    """Return a suite with the verdicts on a subject; `p` is adjusted for the other suites."""
    rule, served = one.task.rule, subject in _SERVED
    against = reference_of(rule.against, one.scores)
    verdicts = []
    if against != subject:  # the reference cannot fall below itself
        # Only what is served must reach a minimum, unless that is all that counts.
        own = rule if served or not against else replace(rule, min_score=0.0)
        verdicts.append(_verdict(one, subject, against, own, p))
    if subject == "image" and "merged" in one.scores:
        # What quantizing and serving changed; only reported.
        loss = _verdict(one, subject, "merged", rule, None)
        verdicts.append(replace(loss, binding=False))
    return replace(one, verdicts=(*one.verdicts, *verdicts))


def _verdict(one: Result, subject: str, against: str, rule: Rule, p: float | None) -> Verdict:
    scores = one.scores
    found = judge_drop(subject, scores[subject], against, scores.get(against), rule, p)
    reason, hint = found.reason, found.hint
    if against == "base" and "adapter" in scores:
        reason = f"{reason}: {_who_lost(scores, subject)}"
        if hint and subject not in _SERVED:  # else the adapter has passed
            hint = f"{_RETAIN}; {hint}"
    return replace(found, reason=named(one.task, reason), hint=hint)


def _who_lost(scores: Scores, subject: str) -> str:
    """Return how many answers were right of the base and are wrong of what came after it."""
    chain = [who for who in ("base", "adapter", "merged", subject) if who in scores]
    chain = list(dict.fromkeys(chain))
    found = []
    for before, after in pairwise(chain):
        change = comparison_of(scores[after], scores[before])
        if change:
            lost = f"{change.lost} of {change.n}" if change.lost else "none"
            found.append(f"{_STEPS[after]} lost {lost}")
    return ", ".join(found)


def unproven(results: Sequence[Result], *, tested: bool = True) -> tuple[tuple[str, ...], ...]:
    """Return for each suite why passing shows nothing; () if it shows what its rule asks.

    `tested`: the images were to be asked by now.
    """
    p = adjusted([chances(one.scores, one.task.rule) for one in results])
    found = []
    for one, mine in zip(results, p, strict=True):
        missing = [_not_asked(one)] if tested and "image" not in one.scores else []
        reasons = (*missing, *inconclusive_reasons(one.scores, one.task.rule, mine))
        found.append(tuple(named(one.task, text) for text in reasons))
    return tuple(found)


def _not_asked(one: Result) -> str:
    text = "the image was not asked"
    if one.not_started:
        text += f", since it is {one.not_started}"
    if "dequantized" in one.scores:
        text += "; its dequantized weights were, in transformers"
    return text


def require(results: Sequence[Result], *, tested: bool) -> None:
    """Raise CheckFailed if a score dropped too much, or a suite that must be proven is not.

    `tested`: the image was to be asked by now.
    """
    for result in results:
        for verdict in result.verdicts:
            verdict.require()
    for result, reasons in zip(results, unproven(results, tested=tested), strict=True):
        if reasons and result.task.settings.require == "proven":
            raise CheckFailed(
                f"not proven: {reasons[0]}",
                hint="ask more or harder questions, train the adapter further, or set"
                " evaluate.require: passed",
            )


def main_scores(results: Sequence[Result]) -> Scores:
    """Return the scores of the first suite, which stand for a build where one line must do."""
    return results[0].scores if results else {}


def unproven_of(results: Sequence[Result]) -> tuple[str, ...]:
    """Return why passing a build's gates shows nothing; () if each shows what it should."""
    if not results:
        return ("the recipe has no `evaluate`",)
    return tuple(reason for reasons in unproven(results) for reason in reasons)


def verdict_of(results: Sequence[Result]) -> str:
    """Return `passed`, or `not proven` if a build's gates could not have failed."""
    return NOT_PROVEN if unproven_of(results) else "passed"


def verdicts_of(results: Sequence[Result]) -> tuple[str, ...]:
    """Return each suite's verdict: `passed`, `not proven` or `failed`."""
    return tuple(
        "failed" if one.failed else NOT_PROVEN if reasons else "passed"
        for one, reasons in zip(results, unproven(results), strict=True)
    )


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
            cosine=_cosine(reference, scores[who]),
        )
    return found


def _cosine(reference: Score, score: Score) -> tuple[float, float] | None:
    if not reference.vectors or len(reference.vectors) != len(score.vectors):
        return None
    from weightsmith.evaluating.ranking import cosines_of  # with numpy

    found = cosines_of(reference.vectors, score.vectors)
    return (round(sum(found) / len(found), 6), round(min(found), 6)) if found else None


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
    return [float(one) for one in str(given or "").split()]
