"""A task: questions and metric."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from weightsmith.core.errors import CheckFailed, EnvironmentFailure
from weightsmith.core.jobs import Pooled, Question
from weightsmith.core.ports import Progress, RunCommand
from weightsmith.core.safe_parse import parse
from weightsmith.core.values import Digest, Json, JsonValue, Score, key_of
from weightsmith.evaluating.client import Ask, KeptAnswers, Refusals, Served, ask, ask_all
from weightsmith.evaluating.items import Item, check_documents, read_corpus
from weightsmith.evaluating.likelihood import Scorer, choose, scorer
from weightsmith.evaluating.metrics import request_row, score_answers
from weightsmith.evaluating.pictures import Picture, named_part
from weightsmith.evaluating.pooling_client import PoolingClient
from weightsmith.evaluating.session import ServerSession, excerpt
from weightsmith.models.task import ModelTask, SentenceTransformers
from weightsmith.recipe.schema import Scoring

Answers = tuple[Mapping[str, JsonValue], ...]
"""One per item, in order: `answer` and further facts, such as `finish_reason`."""

_ALONE_SECONDS = 60.0
"""Seconds that a program has for one answer, after it failed on all at once."""
_MOST_FAILURES = 8
"""Failures before the first verdict that are the program's, and no answer's."""
_QUERY, _DOCUMENT = ("query",), ("document", "passage", "corpus")
_POOLED: Mapping[str, Pooled] = {"embedding": "vectors", "rerank": "relevance"}


@dataclass(frozen=True, kw_only=True)
class Task:
    """Questions, metric and maximum length of an answer."""

    items: tuple[Item, ...]
    metric: str = "contains"
    max_tokens: int = 64
    command: tuple[str, ...] = ()
    """The program of metric `command`, with its arguments."""
    command_seconds: float = 3600.0
    """How long it may take for all answers."""
    tolerance: str = "0"
    """How far a number may be off, for metric `numeric`: `0.5` or `2%`."""
    name: str = ""
    """The task's name, if a build has several."""
    corpus: tuple[tuple[str, str], ...] = ()
    """For metric `embedding`: id and text of each document."""
    recall_at: int = 10
    similarity: str = ""
    """How vectors are compared; "" for as the model's files say."""
    query_prompt: str | None = None
    """Put before each query; None: what sentence-transformers' files say."""
    document_prompt: str | None = None

    @property
    def pooled(self) -> Pooled:
        """What a model that does not chat is asked for."""
        if self.metric == "label":
            first = self.items[0]
            return "label-set" if first.is_set else "word-labels" if first.parts else "label"
        return _POOLED.get(self.metric, "")

    @cached_property
    def texts(self) -> tuple[Item, ...]:
        """What is asked one by one: the questions; for vectors, queries and then documents."""
        if self.pooled != "vectors":
            return self.items
        both = (
            ("query", [item.prompt for item in self.items]),
            ("document", dict(self.corpus).values()),
        )
        return tuple(
            Item(messages=({"role": role, "content": text},), expected=(), line=0, plain=True)
            for role, texts in both
            for text in texts
        )

    @cached_property
    def digest(self) -> Digest:
        """Key of the questions, without expected answers: changing those needs no new run."""
        if self.pooled:
            prompts = [self.query_prompt, self.document_prompt]
            texts: JsonValue = [[dict(one.messages[0]), one.parts] for one in self.texts]
            return key_of([self.pooled, texts, prompts])
        asked: list[JsonValue] = [[dict(m) for m in item.messages] for item in self.items]
        if any(item.pictures for item in self.items):
            return key_of([item.asks for item in self.items])
        if any(item.tools for item in self.items):
            return key_of([asked, [item.tools for item in self.items]])
        if self.metric != "choice":
            return key_of(asked)
        return key_of([asked, [[item.choices, item.plain] for item in self.items]])

    @property
    def questions(self) -> tuple[Question, ...]:
        """The task's questions for a job that asks a checkpoint."""
        return tuple(
            Question(
                messages=item.messages,
                choices=item.choices,
                plain=item.plain,
                tools=item.tools,
                parts=item.parts,
                pictures=tuple(one.seen for one in item.pictures),
            )
            for item in self.texts
        )

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """Those of all questions."""
        return tuple(one for item in self.items for one in item.pictures)

    @property
    def most_tokens(self) -> int:
        """Upper estimate of tokens read and written: one per character, and those of pictures."""
        if self.pooled:
            return sum(self.lengths)
        letters = [
            sum(len(str(m["content"])) for m in item.messages) + len(item.tools)
            for item in self.items
        ]
        if self.metric == "choice":
            return sum(
                count * len(item.choices) + sum(map(len, item.choices))
                for count, item in zip(letters, self.items, strict=True)
            )
        seen = sum(one.tokens for one in self.pictures)
        return sum(letters) + seen + self.max_tokens * len(self.items)

    def prompts(self, model: ModelTask | None = None) -> tuple[str, str]:
        """Return what is put before queries and before documents, by itself or by the model.

        sentence-transformers takes the prompts of these names, else the default one
        (`encode_query` and `encode_document`, 5.0).
        """
        found = []
        for own, names in ((self.query_prompt, _QUERY), (self.document_prompt, _DOCUMENT)):
            sentence = model.sentence if model else SentenceTransformers()
            known = dict(sentence.prompts)
            named = next((name for name in names if known.get(name)), sentence.default_prompt)
            found.append(known.get(named, "") if own is None else own)
        return found[0], found[1]

    @property
    def lengths(self) -> list[int]:
        """Characters of each text that a model which does not chat reads at once."""
        texts = (
            (item.prompt, item.parts if self.pooled == "relevance" else ()) for item in self.texts
        )
        return [len(text) + len(part) for text, parts in texts for part in (parts or ("",))]

    def answers_of(self, answers: Json) -> Answers:
        """Return a job's answers; for metric `choice`, the most likely choices."""
        if self.metric == "choice":
            return tuple(choose(i, s) for i, s in zip(self.items, answers, strict=True))
        return tuple(answers)


def task_with(
    settings: Scoring, items: Sequence[Item], data: str, folder: Path, name: str = ""
) -> Task:
    """Return the task of a suite's settings and its questions, which are from the file `data`.

    Raises UsageError for a corpus, whose path starts from the folder.
    """
    documents = read_corpus(folder / settings.corpus) if settings.corpus else ()
    if documents:
        check_documents(items, documents, data, settings.corpus)
    return Task(
        items=tuple(items),
        metric=settings.metric,
        max_tokens=settings.max_tokens,
        command=settings.command,
        command_seconds=settings.command_seconds,
        tolerance=settings.tolerance,
        name=name,
        corpus=documents,
        recall_at=settings.recall_at,
        similarity=settings.similarity,
        query_prompt=settings.query_prompt,
        document_prompt=settings.document_prompt,
    )


def check_program(task: Task) -> None:
    """Raise EnvironmentFailure if the program of metric `command` is not on this machine."""
    if task.command and shutil.which(task.command[0]) is None:
        raise EnvironmentFailure(
            f"program not found: {task.command[0]!r}, which judges the answers",
            hint="install it and make sure that it is in PATH, or correct evaluate.command",
        )


def ask_server(
    session: ServerSession,
    served: Served,
    task: Task,
    progress: Progress,
    *,
    concurrency: int = 1,
    kept: KeptAnswers | None = None,
    model: ModelTask | None = None,
    watch: Callable[[Mapping[str, JsonValue]], None] | None = None,
) -> Answers:
    """Return a server's answers in order, but ask for none that is `kept`.

    `model` is what is known of one that does not chat: its prompts, and its labels. `watch` gets
    each answer, and ends the asking by an error of its own.

    A question that the server refuses, answers at too great a length or hangs on has an `error`,
    and counts as answered wrongly. Raises CheckFailed if the server stops, refuses all questions,
    or hangs or fails on two in a row.
    """
    answer: Ask = partial(ask, session, served, max_tokens=task.max_tokens)
    about: JsonValue = [served.name, served.path, task.max_tokens]
    if task.metric == "choice":
        score = scorer(session, served)
        answer = partial(_choice, score)
    elif task.pooled:
        client = PoolingClient(
            session=session,
            name=served.name,
            pooled=task.pooled,
            prompts=task.prompts(model),
            labels=model.labels if model else (),
        )
        answer, about = client.ask, [served.name, task.pooled, *client.prompts]
    if kept:
        answer = kept.around(answer, about)
    refusals = Refusals()
    asked = refusals.around(answer)

    def watched(item: Item) -> Mapping[str, JsonValue]:
        said = asked(item)
        if watch:
            watch(said)
        return said

    answers = ask_all(task.texts, watched, progress, concurrency=concurrency)
    refusals.require_an_answer()
    return answers


def _choice(score: Scorer, item: Item) -> Mapping[str, JsonValue]:
    return choose(item, [score(item, choice) for choice in item.choices])


def score_task(
    task: Task,
    answers: Answers,
    run: RunCommand,
    environment: Mapping[str, str] | None = None,
    *,
    similarity: str = "",
) -> Score:
    """Return the score of answers; metric `command` runs the user's program on them.

    `similarity` is how the model's files say that vectors are compared, if the task does not; ""
    for the cosine.
    An answer on which the program fails or hangs is wrong, and `unjudged` says why. Raises
    CheckFailed for a program that fails on each, or prints no valid result.
    """
    if task.pooled:
        from weightsmith.evaluating import ranking  # with numpy, which a command may not need

        match task.pooled:
            case "vectors":
                return ranking.score_vectors(
                    answers, task.items, task.corpus, task.recall_at, task.similarity or similarity
                )
            case "relevance":
                return ranking.score_orders(answers, task.items)
            case "label-set":
                return ranking.score_sets(answers, task.items)
            case _:
                return ranking.score_labels(answers, task.items)
    if task.metric != "command":
        return score_answers(answers, task.items, task.metric, task.tolerance)
    judged = partial(run, task.command, environment or {})
    try:
        output = judged(question_lines(task.items, answers), task.command_seconds)
    except CheckFailed as failed:
        if len(task.items) < 2:
            raise
        return _judged_alone(task, answers, judged, failed)
    return read_verdict(output, task.items, answers)


def _judged_alone(
    task: Task,
    answers: Answers,
    run: Callable[[bytes, float], str],
    failed: CheckFailed,
) -> Score:
    """Return the score of answers that are judged one by one, in the same time as all at once.

    So an answer on which the program fails or hangs costs no other question. Raises `failed` for a
    program that does so on all, or on the first ones, or gives no verdict on a single answer; and
    CheckFailed for one that uses up its time before the last answer.
    """
    rows, judged = list[Mapping[str, JsonValue]](), 0
    ends = time.monotonic() + task.command_seconds
    for item, answer in zip(task.items, answers, strict=True):
        seconds = min(_ALONE_SECONDS, ends - time.monotonic())
        if not judged and len(rows) >= _MOST_FAILURES:
            raise failed
        if seconds <= 0:  # the rest may be right
            raise CheckFailed(
                f"{task.command[0]} took {task.command_seconds:g} s for {len(rows)} of"
                f" {len(answers)} answers",
                hint="give it fewer questions, or more time: evaluate.command_seconds",
            )
        try:
            output = run(question_lines((item,), (answer,)), seconds)
        except CheckFailed as error:
            rows.append(_row(item, answer, False, error.message))
            continue
        found = read_verdict(output, (item,), (answer,)).per_item
        if len(found) != 1 or "ok" not in _printed(output):
            raise failed  # it judges all together
        rows += found
        judged += 1
    if not judged:
        raise failed
    return _score_of(rows)


_HINT = 'it must print {"ok": [true, …]} or {"score": 0.93, "n": 200} as its last line'


def question_lines(items: Sequence[Item], answers: Sequence[Mapping[str, JsonValue]]) -> bytes:
    """Return the program's standard input."""
    lines = [
        json.dumps(
            {
                "prompt": item.prompt,
                "messages": item.in_parts(named_part),
                "expected": list(item.expected),
                "answer": answer["answer"],
                **({"error": answer["error"]} if "error" in answer else {}),
            },
            ensure_ascii=False,
        )
        for item, answer in zip(items, answers, strict=True)
    ]
    return "".join(f"{line}\n" for line in lines).encode()


def read_verdict(
    output: str, items: Sequence[Item], answers: Sequence[Mapping[str, JsonValue]]
) -> Score:
    """Return the score that a program printed, with the questions' verdicts if it gave them.

    Raises CheckFailed for invalid output.
    """
    verdict = _printed(output)
    if "ok" in verdict:
        return _judged(verdict["ok"], items, answers)
    score, n = verdict.get("score"), verdict.get("n", 0)
    if (
        isinstance(score, bool)
        or not isinstance(score, int | float)
        or not math.isfinite(score)
        or not 0 <= score <= 1
        or not isinstance(n, int)
        or n < 0
    ):
        raise CheckFailed(f"invalid score from the command: {score!r}, n={n!r}", hint=_HINT)
    rows = verdict.get("per_item", [])
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise CheckFailed("the command's per_item is not a list of objects", hint=_HINT)
    if not all("ok" in row for row in rows):  # then runs cannot be compared
        rows = []
    per_item = tuple(
        {
            **row,
            "prompt": str(row.get("prompt", f"item {place}")),
            "expected": row.get("expected", []),
            "answer": str(row.get("answer", "")),
            "ok": bool(row["ok"]),
        }
        for place, row in enumerate(rows, start=1)
    )
    return Score(score=float(score), n=n, metric="command", per_item=per_item)


def _judged(
    verdicts: JsonValue, items: Sequence[Item], answers: Sequence[Mapping[str, JsonValue]]
) -> Score:
    if not isinstance(verdicts, list) or len(verdicts) != len(items):
        count = len(verdicts) if isinstance(verdicts, list) else "no"
        raise CheckFailed(f"the command judged {count} of {len(items)} answers", hint=_HINT)
    rows = [
        _row(item, answer, bool(verdict))
        for item, answer, verdict in zip(items, answers, verdicts, strict=True)
    ]
    return _score_of(rows)


def _printed(output: str) -> Mapping[str, Json]:
    """Return the JSON object that a program printed; raise CheckFailed if it is none."""
    for text in (output, *reversed(output.splitlines())):
        with suppress(ValueError):
            verdict = parse(text)
            if isinstance(verdict, dict):
                return verdict
    raise CheckFailed("the command printed no JSON object", hint=_HINT)


def _row(
    item: Item, answer: Mapping[str, JsonValue], right: bool, unjudged: str = ""
) -> Mapping[str, JsonValue]:
    return {
        **request_row(item),
        "expected": list(item.expected),
        **answer,
        "ok": right and "error" not in answer,
        **({"unjudged": f"line {item.line}: {excerpt(unjudged)}"} if unjudged else {}),
    }


def _score_of(rows: Sequence[Mapping[str, JsonValue]]) -> Score:
    right = sum(bool(row["ok"]) for row in rows)
    share = right / len(rows) if rows else 0.0
    return Score(score=share, n=len(rows), metric="command", per_item=tuple(rows))
