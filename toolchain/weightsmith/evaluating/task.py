"""A task: questions and metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

from weightsmith.core.jobs import Question
from weightsmith.core.ports import Progress, RunCommand
from weightsmith.core.values import Digest, Json, Score, key_of
from weightsmith.evaluating.answer_cache import KeptAnswers
from weightsmith.evaluating.client import Ask, ask_all
from weightsmith.evaluating.harness import question_lines, read_verdict
from weightsmith.evaluating.items import Item
from weightsmith.evaluating.likelihood import choose, scorer
from weightsmith.evaluating.metrics import score_answers
from weightsmith.evaluating.served import Served, ask
from weightsmith.evaluating.session import ServerSession

Answers = tuple[Mapping[str, Json], ...]
"""One per item, in order: `answer` and further facts, such as `finish_reason`."""

_COMMAND_SECONDS = 3600.0


@dataclass(frozen=True, kw_only=True)
class Task:
    """Questions, metric and maximum length of an answer."""

    items: tuple[Item, ...]
    metric: str = "contains"
    max_tokens: int = 64
    command: tuple[str, ...] = ()
    """The program of metric `command`, with its arguments."""
    name: str = ""
    """The task's name, if a build has several."""

    @cached_property
    def digest(self) -> Digest:
        """Key of the questions, without expected answers: changing those needs no new run."""
        asked: list[Json] = [[dict(m) for m in item.messages] for item in self.items]
        if self.metric != "choice":
            return key_of(asked)
        return key_of([asked, [[item.choices, item.plain] for item in self.items]])

    @property
    def questions(self) -> tuple[Question, ...]:
        """The task's questions for a job that asks a checkpoint."""
        return tuple(
            Question(messages=item.messages, choices=item.choices, plain=item.plain)
            for item in self.items
        )

    @property
    def most_tokens(self) -> int:
        """Upper estimate of tokens read and written: one per character."""
        letters = [sum(len(str(m["content"])) for m in item.messages) for item in self.items]
        if self.metric == "choice":
            return sum(
                count * len(item.choices) + sum(map(len, item.choices))
                for count, item in zip(letters, self.items, strict=True)
            )
        return sum(letters) + self.max_tokens * len(self.items)

    def answers_of(self, answers: Sequence[Json]) -> Answers:
        """Return a job's answers; for metric `choice`, the most likely choices."""
        if self.metric == "choice":
            return tuple(choose(i, s) for i, s in zip(self.items, answers, strict=True))
        return tuple(answers)


def ask_server(
    session: ServerSession,
    served: Served,
    task: Task,
    progress: Progress,
    *,
    concurrency: int = 1,
    kept: KeptAnswers | None = None,
) -> Answers:
    """Return a server's answers in order, but ask for none that is `kept`.

    Raises CheckFailed if the server fails.
    """
    answer = (
        _chooser(session, served)
        if task.metric == "choice"
        else partial(ask, session, served, max_tokens=task.max_tokens)
    )
    if kept:
        answer = kept.around(answer, [served.name, served.path, task.max_tokens])
    return ask_all(task.items, answer, progress, concurrency=concurrency)


def _chooser(session: ServerSession, served: Served) -> Ask:
    score = scorer(session, served)
    return lambda item: choose(item, [score(item, choice) for choice in item.choices])


def score_task(
    task: Task,
    answers: Answers,
    run: RunCommand,
    environment: Mapping[str, str] | None = None,
) -> Score:
    """Return the score of answers; metric `command` runs the user's program on them.

    Raises CheckFailed for a program that fails or prints no valid result.
    """
    if task.metric != "command":
        return score_answers(answers, task.items, task.metric)
    output = run(
        task.command, environment or {}, question_lines(task.items, answers), _COMMAND_SECONDS
    )
    return read_verdict(output, task.items, answers)
