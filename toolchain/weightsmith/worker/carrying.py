"""Answers of the merged model that need no forward, in the job that also validates the merge.

Each token of an adapter's answer has a margin: the nats by which it was likelier than the second
likeliest. If no logit differs by more than d between both models, no margin differs by more than
2 d; so if all margins of an answer are larger, the merged model writes the same tokens, each after
the same ones. Such an answer is carried over, with the bound as its mark.

Validation measures d: the largest difference, over all tokens of the vocabulary at each position of
its probes. Rounding moves logits by sums of many small errors. They are taken to be independent and
of mean zero (as by Higham and Mary, A New Approach to Probabilistic Rounding Error Analysis,
nla-group.org/2018/11/22), so their sums to be about normal. The largest of n normal values is near
sqrt(2 ln n) standard deviations (de Haan and Ferreira, Extreme Value Theory: An Introduction,
example 1.1.7): of the millions that are compared, some five, and 2 d is more than seven of a
margin's, which has the errors of two logits. Other
prompts may have larger errors: they may be twice as large, as in the verdict on greedy texts
(`_ROOM` in validating/probes.py). Measured on the support bot: the bound was 0.22 nats, and the
largest change of 499 margins 0.017.

A bound may be wrong all the same. So some are asked: the probes, a tenth of the other questions,
and answers with a token that is likely below the bound. Each of their tokens tests it, and if one
does not keep to it, all are asked.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from weightsmith.core.jobs import AskedModel, AskedTask, Input, ProofJob, ReferenceJob
from weightsmith.core.values import JsonValue

if TYPE_CHECKING:
    from weightsmith.merging.reference import Answered

_ROOM = 2.0
"""Factor on the largest difference of logits that validation has seen, for other prompts."""
_LEAST, _SHARE = 4, 10
"""Of the questions that are no probes, so many are asked at least, and one in so many."""
_NEAR = 0.5
"""Nats: answers with a smaller margin are asked before the bound is known, which is mostly smaller.
A wrong guess costs another walk, or a few answers too many."""
_WORTH = 3
"""At least one question in so many must be left, or all are asked at once."""

Text = tuple[Sequence[int], Sequence[int]]
"""A question and its answer, in tokens."""
Drafts = Mapping[str, Sequence[Sequence[int]]]
Ask = Callable[[ReferenceJob, Drafts], Mapping[str, Any]]
"""Asks a job's models, with drafts of answers in tokens by key; returns what they say, by key."""
Row = Mapping[str, JsonValue]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A merged model, and base and adapters unmerged, which are asked the same task."""

    walk: int
    """Number of the job's walk."""
    task: AskedTask
    merged: AskedModel


def pairs_of(job: ProofJob) -> tuple[Pair, ...]:
    """Return the merged models of which validation measures what their adapters are compared with.

    That is the weighted sum of all adapters, for texts: its probes have no pictures.
    """
    own, asked = job.validation, job.reference
    found = []
    for number, walk in enumerate(asked.walks if own.scope == "all" else ()):
        for task in walk.tasks:
            known = {one.key: one for one in task.models}
            for merged in task.models:
                like = known.get(merged.draft)
                if like is None or any(one.pictures for one in task.questions):
                    continue
                given = (asked.models[like.model], *(asked.adapters[n] for n in like.adapters))
                same = [*map(_content, given)] == [*map(_content, (own.base, *own.adapters))]
                if same and like.weights == own.weights:
                    found.append(Pair(walk=number, task=task, merged=merged))
    return tuple(found)


def _content(given: Input) -> object:
    return given.files or given.path


class Carrying:
    """The answers of a job's merged models, some of which may be carried over."""

    def __init__(self, job: ProofJob, ask: Ask) -> None:
        self._job, self._ask, self._pairs = job, ask, pairs_of(job)
        self._adapters: list[Answered] = []
        self._asked: list[dict[int, tuple[Row, Text]]] = [{} for _ in self._pairs]

    @property
    def texts(self) -> list[Text]:
        """Questions and answers of the merged models, in tokens."""
        return [text for asked in self._asked for _, text in asked.values()]

    @property
    def others(self) -> ReferenceJob:
        """The job without these models."""
        keys = {pair.merged.key for pair in self._pairs}
        tasks = (
            [
                replace(task, models=tuple(one for one in task.models if one.key not in keys))
                for task in walk.tasks
            ]
            for walk in self._job.reference.walks
        )
        return _with_tasks(self._job.reference, [*tasks])

    def ask_some(self, found: Mapping[str, Any]) -> None:
        """Ask the probes, a sample, and what is likely below the bound.

        `found` has what the adapters answered.
        """
        from weightsmith.validating.probes import choose

        self._adapters = [found[pair.merged.draft] for pair in self._pairs]
        probes = [[*map(dict, chat)] for chat in choose(self._job.validation.chats)]
        numbers = []
        for pair, adapter in zip(self._pairs, self._adapters, strict=True):
            chats = [[*map(dict, one.messages)] for one in pair.task.questions]
            first = {n for n, chat in enumerate(chats) if chat in probes}
            first |= {n for n, row in enumerate(adapter.rows) if not _exceeds(row, _NEAR)}
            rest = [n for n in range(len(chats)) if n not in first]
            sample = min(len(rest), max(_LEAST, len(rest) // _SHARE))
            first |= {*random.Random(0).sample(rest, sample)}  # noqa: S311 - nothing secret
            left = len(chats) - len(first)
            numbers.append(sorted(first) if left * _WORTH >= len(chats) else [*range(len(chats))])
        self._answer(numbers)

    def ask_rest(self, largest: float | None) -> Mapping[str, list[Row]]:
        """Ask what the bound does not decide; return all rows by key, carried ones with a mark.

        `largest` is the difference of logits that validation measured; without one, all are asked.
        """
        bound = float("inf") if largest is None else 2 * _ROOM * largest
        while any(left := [self._left(n, bound) for n in range(len(self._pairs))]):
            self._answer(left)
        mark: Row = {"carried": round(bound, 4)}
        found = {}
        for pair, adapter, asked in zip(self._pairs, self._adapters, self._asked, strict=True):
            found[pair.merged.key] = [
                asked[n][0] if n in asked else {**row, **mark} for n, row in enumerate(adapter.rows)
            ]
        return found

    def _left(self, number: int, bound: float) -> list[int]:
        """Return what a merged model must still be asked."""
        adapter, asked = self._adapters[number], self._asked[number]
        kept = all(
            _keeps((adapter.rows[n], adapter.texts[n]), one, bound) for n, one in asked.items()
        )
        rest = ((n, row) for n, row in enumerate(adapter.rows) if n not in asked)
        return [n for n, row in rest if not (kept and _exceeds(row, bound))]

    def _answer(self, numbers: Sequence[Sequence[int]]) -> None:
        """Ask each merged model the questions of these numbers, with the adapter's as drafts."""
        tasks: list[list[AskedTask]] = [[] for _ in self._job.reference.walks]
        drafts, keys = dict[str, Sequence[Sequence[int]]](), list[str]()
        for pair, adapter, some in zip(self._pairs, self._adapters, numbers, strict=True):
            # A part has another key, so that nobody takes it for all of the answers.
            whole = len(some) == len(pair.task.questions)
            keys.append(pair.merged.key if whole else f"{pair.merged.key} {some}")
            drafts[keys[-1]] = [adapter.texts[n][1] for n in some]
            model = replace(pair.merged, key=keys[-1], draft="")
            questions = tuple(pair.task.questions[n] for n in some)
            if some:
                tasks[pair.walk].append(replace(pair.task, models=(model,), questions=questions))
        found = self._ask(_with_tasks(self._job.reference, tasks), drafts)
        for key, some, asked in zip(keys, numbers, self._asked, strict=True):
            if some:
                both = zip(found[key].rows, found[key].texts, strict=True)
                asked.update(zip(some, both, strict=True))


def _with_tasks(job: ReferenceJob, tasks: Sequence[Sequence[AskedTask]]) -> ReferenceJob:
    walks = []
    for walk, some in zip(job.walks, tasks, strict=True):
        if left := tuple(task for task in some if task.models):
            walks.append(replace(walk, tasks=left))
    return replace(job, walks=tuple(walks))


def _margins(row: Row) -> list[float]:
    return [float(margin) for margin in str(row["margins"]).split()]


def _exceeds(row: Row, bound: float) -> bool:
    """Return whether all margins of an answer are larger than the bound."""
    margins = _margins(row)
    return bool(margins) and all(margin > bound for margin in margins)


def _keeps(adapter: tuple[Row, Text], merged: tuple[Row, Text], bound: float) -> bool:
    """Return whether no margin of an answer moved by more than the bound, up to another token."""
    (row, (_, tokens)), (other_row, (_, others)) = adapter, merged
    margins = zip(_margins(row), _margins(other_row), strict=False)
    for token, other, (margin, own) in zip(tokens, others, margins, strict=False):
        if token != other:
            return margin + own <= bound
        if not abs(margin - own) <= bound:
            return False
    return True
