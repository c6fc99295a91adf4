"""A candidate of the target `auto`: its suites, asked in sequence until it is clear what they show.

What it was asked is judged here before the gate judges it as it judges every image.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from weightsmith.core.errors import CheckFailed
from weightsmith.core.ports import RunCommand
from weightsmith.core.values import JsonValue, Score
from weightsmith.evaluating.build_record import SequenceRecord
from weightsmith.evaluating.gate import reference_of
from weightsmith.evaluating.results import RecipeTask, Result, named
from weightsmith.evaluating.sequential import DropTest, asking_order, drops_of, limit_of
from weightsmith.evaluating.task import Answers, Task, score_task

Watch = Callable[[Mapping[str, JsonValue]], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidacy:
    """What a candidate must keep to."""

    level: float
    """The chance of an error that its tests may have."""
    at_most: int
    """Largest size of its weights in bytes; 0 for any."""
    next_price: int
    """Foreseen bytes of the next candidate, which comes before it if it is larger than that; 0 if
    there is none, or if speed is preferred."""
    measured: bool = False
    """Whether its speed is measured before it is asked."""
    speed: float = 0.0
    """Its tokens per second, if they were measured before."""
    next_speed: float = 0.0
    """Foreseen tokens per second of the next candidate, which comes before it if it is slower than
    that; 0 if there is none."""


class LargerThanForeseen(Exception):
    """A candidate's weights are larger than those of the next one."""

    def __init__(self, size: int) -> None:
        super().__init__("the weights are larger than foreseen")
        self.size = size


class SlowerThanForeseen(Exception):
    """A candidate has fewer tokens per second than the next one may have."""

    def __init__(self, speed: float) -> None:
        super().__init__("the image is slower than foreseen")
        self.speed = speed


def test_of(task: RecipeTask, level: float) -> DropTest:
    """Return the test of a suite's drop."""
    return DropTest(limit=limit_of(task.rule), level=level, questions=len(task.task.items))


class Unprovable(CheckFailed):
    """The questions that are left cannot prove a suite any more (exit 4)."""


def unprovable(
    result: Result, level: float, drops: Sequence[float], speed: float = 0.0
) -> Unprovable:
    """Return the error for drops of the questions that were asked, in their order.

    `speed` is the image's, if it was measured.
    """
    found = _record(result, level, drops)
    return Unprovable(
        named(
            result.task,
            f"after {found.asked} of {found.questions} questions, of which {found.lost} were"
            f" lost and {found.won} won, the others cannot prove any more that the drop is"
            f" below {found.limit:g}",
        ),
        hint="choose a format that loses less",
        details={"sequence": [found.to_json()], "drops": drops, "speed": speed},
    )


def ask_in_sequence(
    result: Result, level: float, ask: Callable[[Task, Watch | None], Answers], command: RunCommand
) -> Answers:
    """Return a suite's answers in the order of its file, asked in that of `asking_order`.

    Raises Unprovable as soon as it is. If it is proven, the others are asked for the gate. Metrics
    that judge all answers at once are not watched.
    """
    task = result.task.task
    if task.pooled or task.metric == "command":
        return ask(task, None)
    order, drops, test = asking_order(task.items), list[float](), test_of(result.task, level)
    reference = _reference(result)

    def watch(answer: Mapping[str, JsonValue]) -> None:
        item = task.items[order[len(drops)]]
        (value,) = score_task(replace(task, items=(item,)), (answer,), command).values
        before = replace(reference, per_item=(reference.per_item[order[len(drops)]],))
        drops.extend(drops_of(result.task.rule, [value], before))
        if drops[-1] > 0 and test.hopeless(Counter(drops)) and not test.proven_at(drops):
            raise unprovable(result, level, drops)

    answers = ask(replace(task, items=tuple(task.items[place] for place in order)), watch)
    by_place = dict(zip(order, answers, strict=True))
    return tuple(by_place[place] for place in range(len(order)))


def sequences(results: Sequence[Result], level: float) -> tuple[SequenceRecord, ...]:
    """Return what the image's answers to each suite show; of suites without questions, nothing."""
    found = []
    for one in results:
        score = one.scores.get("image")
        if score and len(score.per_item) == len(one.task.task.items):
            drops = drops_of(one.task.rule, score.values, _reference(one))
            order = asking_order(one.task.task.items)
            found.append(_record(one, level, [drops[place] for place in order]))
    return tuple(found)


def require_proven(results: Sequence[Result], level: float) -> None:
    """Raise CheckFailed unless every suite is proven."""
    found = sequences(results, level)
    for one in found:
        if not one.proven_at:
            which = f"{one.suite}: " if one.suite else ""
            raise CheckFailed(
                f"{which}{one.asked} questions, of which {one.lost} were lost and {one.won} won, do"
                f" not prove that the drop is below {one.limit:g}: it may be {one.interval[1]:.3f}",
                hint="choose a format that loses less, or ask more questions",
                details={"sequence": [each.to_json() for each in found]},
            )
    if len(found) < len(results):
        raise CheckFailed(
            "not proven: a suite has no result per question",
            hint="let its command print one verdict per question",
        )


def _reference(result: Result) -> Score:
    who = reference_of(result.task.rule.against or "adapter", result.scores)
    return result.scores[who]


def _record(result: Result, level: float, drops: Sequence[float]) -> SequenceRecord:
    test = test_of(result.task, level)
    found, rule = test.interval(drops), result.task.rule
    before = _reference(result).score if rule.against else 1.0
    return SequenceRecord(
        suite=result.task.task.name,
        limit=test.limit,
        questions=test.questions,
        asked=found.asked,
        lost=found.lost,
        won=found.won,
        drop=round(found.drop, 6),
        interval=(round(found.low, 6), round(found.high, 6)),
        proven_at=found.proven_at,
        score=round(before - found.drop, 6),
    )
