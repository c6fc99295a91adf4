"""`invoke evaluate`: a started image, a server, or a checkpoint, scored on a data file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from weightsmith.checkpoints.facts import read_facts
from weightsmith.commands.folders import open_sources
from weightsmith.commands.server import ServerSource, served_name, session_with
from weightsmith.destinations import Unkept
from weightsmith.errors import CheckFailed, InputRefused, UsageError
from weightsmith.evaluating.gate import DropLimit, judge_drop, too_few
from weightsmith.evaluating.items import read_items
from weightsmith.evaluating.leaks import describe, find_leaks
from weightsmith.evaluating.metrics import check_metric
from weightsmith.evaluating.session import SessionLimits
from weightsmith.evaluating.statistics import wilson
from weightsmith.evaluating.task import Answers, Task, ask_server, score_task
from weightsmith.foreign import TOKENIZER, parse_file
from weightsmith.recipe import Scoring
from weightsmith.stages.reference import BUILDER, answers
from weightsmith.stages.reference import Subject as AskedModel
from weightsmith.tools import Tools
from weightsmith.values import Json, Score


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What is asked: exactly one of image, url and model."""

    image: str = ""
    url: str = ""
    model: str = ""
    adapters: tuple[str, ...] = ()
    served_name: str = ""
    """The model's name at the server; the first that it lists by default."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateOptions:
    """How it is asked and judged."""

    scoring: Scoring
    """`max_drop` and `certainty` are not used: the limit is the one below."""
    concurrency: int = 1
    timeout: float = 120.0
    """Seconds for one answer."""
    retries: int = 2
    calibration: str = ""
    against: str = ""
    """What an earlier `evaluate --json` printed, to compare with item by item."""
    max_drop: float | None = None


def evaluate_subject(
    subject: Subject, data: Path, options: EvaluateOptions, tools: Tools
) -> Mapping[str, Json]:
    """Return `{score, n, metric, interval, per_item}` and, with `against`, `comparison`.

    Raises UsageError for the data or the options, InputRefused for leaked questions where that is
    strict, CheckFailed for a server that fails or a score that is too low.
    """
    check_subject(subject)
    if subject.model:
        tools.runner.check(BUILDER)
    task = _task(data, options)
    _check_leaks(task, options, tools)
    before = _earlier(options.against) if options.against else None
    tools.progress.stage("evaluate", f"{len(task.items)} questions")
    score = _score(subject, task, options, tools)
    right = sum(bool(row["ok"]) for row in score.per_item)
    result: dict[str, Json] = {
        "score": score.score,
        "n": score.n,
        "metric": score.metric,
        "interval": wilson(right if score.per_item else round(score.score * score.n), score.n),
        "per_item": list(score.per_item),
    }
    limit = DropLimit(
        max_drop=1.0 if options.max_drop is None else options.max_drop,
        min_score=options.scoring.min_score,
    )
    verdict = judge_drop("this", score, "other", before, limit)
    if before is not None:
        check_same_questions(score, before)
        result["comparison"] = verdict.facts
        if options.max_drop is not None and (few := too_few(verdict, options.max_drop)):
            tools.progress.warn(few)
    verdict.require()
    return result


def check_subject(subject: Subject) -> None:
    """Raise UsageError unless exactly one of image, server and checkpoint is given."""
    given = [name for name in ("image", "url", "model") if getattr(subject, name)]
    if len(given) != 1:
        raise UsageError(
            "give exactly one of --image, --url and --model",
            hint="--image REF starts an image, --url asks a server, --model loads a checkpoint",
        )
    if subject.adapters and not subject.model:
        raise UsageError("--adapter needs --model", hint="an image holds its merged weights")


def _task(data: Path, options: EvaluateOptions) -> Task:
    items, scoring = read_items(data), options.scoring
    check_metric(scoring.metric, items)
    return Task(
        items=items,
        metric=scoring.metric,
        max_tokens=scoring.max_tokens,
        command=scoring.command,
    )


def _check_leaks(task: Task, options: EvaluateOptions, tools: Tools) -> None:
    for other in (options.scoring.training, options.calibration):
        leaks = describe(find_leaks(task.items, Path(other))) if other else ""
        if leaks and options.scoring.strict:
            raise InputRefused(leaks, hint="remove them from either file, or leave --strict out")
        if leaks:
            tools.progress.warn(leaks)


def _score(subject: Subject, task: Task, options: EvaluateOptions, tools: Tools) -> Score:
    if subject.model:
        return score_task(task, _ask_checkpoint(subject, task, tools), tools.command)
    place = ServerSource(image=subject.image, url=subject.url)
    limits = SessionLimits(request_seconds=options.timeout, tries=options.retries + 1)
    with session_with(place, tools, limits, modest=True) as session:
        name = served_name(session, subject.served_name)
        answers = ask_server(session, name, task, tools.progress, concurrency=options.concurrency)
        # While the server is there: the command may ask it on its own.
        environment = {
            "WEIGHTSMITH_URL": f"{session.endpoint.url}/v1",
            "WEIGHTSMITH_MODEL": name,
        }
        return score_task(task, answers, tools.command, environment)


def _ask_checkpoint(subject: Subject, task: Task, tools: Tools) -> Answers:
    model = Path(subject.model)
    read_facts(model)
    adapters = [Path(adapter) for adapter in subject.adapters]
    weights = [1.0] * len(adapters)
    sources = open_sources(model, adapters, weights, tools.store)
    asked = AskedModel(model=sources.base.tree, adapters=sources.adapters)
    return answers({"model": asked}, task, Unkept(tools), tools)["model"]


def _earlier(path: str) -> Score:
    """Return the score that an earlier run printed with --json."""
    try:
        data = parse_file(Path(path), largest=TOKENIZER)
        rows = tuple({**row, "ok": bool(row["ok"])} for row in data["per_item"])
        return Score(
            score=float(data["score"]),
            n=int(data["n"]),
            metric=str(data.get("metric", "")),
            per_item=rows,
        )
    except OSError as error:
        raise UsageError(
            f"cannot read {path}: {error.strerror}",
            hint="save one with `evaluate … --json > before.json`",
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UsageError(
            f"{path} is not the output of `evaluate --json`",
            hint="save one with `evaluate … --json > before.json`",
        ) from None


def check_same_questions(now: Score, before: Score) -> None:
    """Raise CheckFailed where two runs were asked different questions."""
    asked = [[row["prompt"] for row in score.per_item] for score in (now, before)]
    if asked[0] != asked[1]:
        raise CheckFailed(
            "the two runs were asked different questions",
            hint="compare runs on the same data file",
        )
