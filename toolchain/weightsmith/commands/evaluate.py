"""`invoke evaluate`: score an image, a server or a checkpoint on a data file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from weightsmith.checkpoints.facts import read_facts
from weightsmith.commands.folders import open_sources
from weightsmith.commands.server import ServerSource, served_model, session_with
from weightsmith.errors import CheckFailed, InputRefused, UsageError
from weightsmith.evaluating.doubts import sampled
from weightsmith.evaluating.gate import DropLimit, judge_drop, too_few
from weightsmith.evaluating.items import read_items, sample
from weightsmith.evaluating.kept import KeptAnswers
from weightsmith.evaluating.leaks import describe, find_leaks
from weightsmith.evaluating.metrics import check_metric
from weightsmith.evaluating.session import SessionLimits
from weightsmith.evaluating.statistics import wilson
from weightsmith.evaluating.subjects import BUILDER
from weightsmith.evaluating.subjects import Subject as AskedModel
from weightsmith.evaluating.task import Answers, Task, ask_server, score_task
from weightsmith.foreign import TOKENIZER, parse_file
from weightsmith.recipe import Scoring
from weightsmith.stages.reference import answers
from weightsmith.steps.destinations import Unkept
from weightsmith.tools import Tools
from weightsmith.values import Json, Score
from weightsmith.visible import joined


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What to evaluate: exactly one of image, url and model."""

    image: str = ""
    url: str = ""
    model: str = ""
    adapters: tuple[str, ...] = ()
    served_name: str = ""
    """The model's name on the server; by default, the first that the server lists."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateOptions:
    """How to query the model and score its answers."""

    scoring: Scoring
    """`max_drop` and `require` are ignored; the limit below applies instead."""
    concurrency: int = 1
    timeout: float = 120.0
    """Time limit for one answer, in seconds."""
    retries: int = 2
    calibration: str = ""
    limit: int = 0
    """Maximum number of questions, chosen by content; 0: all."""
    against: str | Score = ""
    """An earlier score, or the file of its `evaluate --json`, compared item by item."""
    max_drop: float | None = None
    answers: str = ""
    """File that keeps a server's answers, for a run that goes on after an interrupt."""


def evaluate_subject(
    subject: Subject, data: Path, options: EvaluateOptions, tools: Tools
) -> Mapping[str, Json]:
    """Return `{score, n, metric, interval, per_item}` and, with `against`, `comparison`.

    Raises UsageError for invalid data or options, InputRefused for leaked questions if the task is
    strict, CheckFailed if the server fails or the score is too low.
    """
    check_subject(subject)
    kept = KeptAnswers(Path(options.answers)) if options.answers else None
    if subject.model:
        if kept:
            raise UsageError(
                "--answers keeps a server's answers, and --model starts none", hint="leave it out"
            )
        tools.runner.check(BUILDER)
    task = _task(data, options, tools)
    _check_leaks(task, options, tools)
    before = _earlier(options.against) if isinstance(options.against, str) else options.against
    tools.progress.stage("evaluate", f"{len(task.items)} questions")
    score = _score(subject, task, options, tools, kept)
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


def evaluate_text(result: Mapping[str, Json]) -> str:
    """Return the score with its interval as text, and the comparison's reason below it."""
    low, high = result["interval"]
    text = (
        f"{result['score']:.4f} "
        f"({result['metric']}, n={result['n']}, 95 %: {low:.3f} to {high:.3f})"
    )
    return joined([text, result["comparison"]["reason"]] if "comparison" in result else [text])


def check_subject(subject: Subject) -> None:
    """Raise UsageError unless exactly one of image, server and checkpoint is given."""
    given = [name for name in ("image", "url", "model") if getattr(subject, name)]
    if len(given) != 1:
        raise UsageError(
            "give exactly one of --image, --url and --model",
            hint="--image REF starts an image, --url queries a server, --model loads a checkpoint",
        )
    if subject.adapters and not subject.model:
        raise UsageError(
            "--adapter needs --model",
            hint="an image has merged weights: remove --adapter, or give --model",
        )


def _task(data: Path, options: EvaluateOptions, tools: Tools) -> Task:
    everything, scoring = read_items(data), options.scoring
    check_metric(scoring.metric, everything)
    items = sample(everything, options.limit)
    if len(items) < len(everything):
        tools.progress.note(sampled(len(items), len(everything)))
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
            raise InputRefused(
                leaks, hint="remove them from one of the two files, or remove --strict"
            )
        if leaks:
            tools.progress.warn(leaks)


def _score(
    subject: Subject,
    task: Task,
    options: EvaluateOptions,
    tools: Tools,
    kept: KeptAnswers | None,
) -> Score:
    if subject.model:
        return score_task(task, _ask_checkpoint(subject, task, tools), tools.command)
    place = ServerSource(image=subject.image, url=subject.url)
    limits = SessionLimits(request_seconds=options.timeout, tries=options.retries + 1)
    with session_with(place, tools, limits, modest=True) as session:
        served = served_model(session, place, subject.served_name)
        count = options.concurrency
        answers = ask_server(session, served, task, tools.progress, concurrency=count, kept=kept)
        # The server must still be running: the command may query it.
        environment = {
            "WEIGHTSMITH_URL": f"{session.endpoint.url}/v1",
            "WEIGHTSMITH_MODEL": served.name,
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


def _earlier(path: str) -> Score | None:
    """Return the score from an earlier run's --json output, None without one."""
    if not path:
        return None
    try:
        data = parse_file(Path(path), largest=TOKENIZER)
        rows = tuple(
            {**row, "prompt": row["prompt"], "ok": bool(row["ok"])} for row in data["per_item"]
        )
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
    except (ArithmeticError, ValueError, KeyError, TypeError, AttributeError):
        raise UsageError(
            f"{path} is not the output of `evaluate --json`",
            hint="save one with `evaluate … --json > before.json`",
        ) from None


def check_same_questions(now: Score, before: Score) -> None:
    """Raise CheckFailed if the two runs used different questions."""
    asked = [[row["prompt"] for row in score.per_item] for score in (now, before)]
    if asked[0] != asked[1]:
        raise CheckFailed(
            "the two runs used different questions",
            hint="compare runs on the same data file",
        )
