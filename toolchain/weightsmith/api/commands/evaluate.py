"""`invoke evaluate`: score an image, a server or a checkpoint on a data file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from weightsmith.api.commands.folders import open_sources
from weightsmith.api.commands.requests import EvaluateCommand
from weightsmith.api.commands.server import ServerSource, served_model, session_with
from weightsmith.core.errors import CheckFailed, InputRefused, UsageError
from weightsmith.core.escape import joined
from weightsmith.core.safe_parse import TOKENIZER, parse_file
from weightsmith.core.values import Json, Score
from weightsmith.evaluating.client import KeptAnswers
from weightsmith.evaluating.contamination import describe, find_contamination
from weightsmith.evaluating.gate import DropLimit, judge_drop, sampled, too_few, wilson
from weightsmith.evaluating.items import read_items, sample
from weightsmith.evaluating.metrics import check_metric
from weightsmith.evaluating.session import SessionLimits
from weightsmith.evaluating.task import Answers, Task, ask_server, score_task
from weightsmith.evaluating.walks import BUILDER, EvaluatedModel
from weightsmith.models.facts import read_facts
from weightsmith.stages.reference import answers as reference_answers
from weightsmith.steps.destinations import Unkept
from weightsmith.steps.tools import Tools


def evaluate_subject(asked: EvaluateCommand, tools: Tools) -> Mapping[str, Json]:
    """Return `{score, n, metric, interval, per_item}` and, with `against`, `comparison`.

    Raises UsageError for invalid data or options, InputRefused for leaked questions if the task is
    strict, CheckFailed if the server fails or the score is too low.
    """
    _check_subject(asked)
    kept = KeptAnswers(asked.answers) if asked.answers else None
    if asked.model:
        if kept:
            raise UsageError(
                "--answers keeps a server's answers, and --model starts none", hint="leave it out"
            )
        tools.runner.check(BUILDER)
    task = _task(asked, tools)
    _check_leaks(task, asked, tools)
    before = _earlier(asked.against) if isinstance(asked.against, str) else asked.against
    tools.progress.stage("evaluate", f"{len(task.items)} questions")
    score = _score(task, asked, tools, kept)
    right = sum(bool(row["ok"]) for row in score.per_item)
    result: dict[str, Json] = {
        "score": score.score,
        "n": score.n,
        "metric": score.metric,
        "interval": wilson(right if score.per_item else round(score.score * score.n), score.n),
        "per_item": list(score.per_item),
    }
    limit = DropLimit(
        max_drop=1.0 if asked.max_drop is None else asked.max_drop,
        min_score=asked.scoring.min_score,
    )
    verdict = judge_drop("this", score, "other", before, limit)
    if before is not None:
        check_same_questions(score, before)
        result["comparison"] = verdict.facts
        if asked.max_drop is not None and (few := too_few(verdict, asked.max_drop)):
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


def _check_subject(asked: EvaluateCommand) -> None:
    """Raise UsageError unless exactly one of image, server and checkpoint is given."""
    if sum(map(bool, (asked.image, asked.url, asked.model))) != 1:
        raise UsageError(
            "give exactly one of --image, --url and --model",
            hint="--image REF starts an image, --url queries a server, --model loads a checkpoint",
        )
    if asked.adapters and not asked.model:
        raise UsageError(
            "--adapter needs --model",
            hint="an image has merged weights: remove --adapter, or give --model",
        )


def _task(asked: EvaluateCommand, tools: Tools) -> Task:
    if asked.data is None:
        raise AssertionError("without tasks, there are questions")
    everything, scoring = read_items(asked.data), asked.scoring
    check_metric(scoring.metric, everything)
    items = sample(everything, asked.limit)
    if len(items) < len(everything):
        tools.progress.note(sampled(len(items), len(everything)))
    return Task(
        items=items,
        metric=scoring.metric,
        max_tokens=scoring.max_tokens,
        command=scoring.command,
    )


def _check_leaks(task: Task, asked: EvaluateCommand, tools: Tools) -> None:
    for other in (asked.scoring.training, asked.calibration):
        leaks = describe(find_contamination(task.items, Path(other))) if other else ""
        if leaks and asked.scoring.strict:
            raise InputRefused(
                leaks, hint="remove them from one of the two files, or remove --strict"
            )
        if leaks:
            tools.progress.warn(leaks)


def _score(task: Task, asked: EvaluateCommand, tools: Tools, kept: KeptAnswers | None) -> Score:
    if asked.model:
        answers = _ask_checkpoint(asked.model, asked.adapters, task, tools)
        return score_task(task, answers, tools.command)
    place = ServerSource(image=asked.image, url=asked.url)
    limits = SessionLimits(request_seconds=asked.timeout, tries=asked.retries + 1)
    with session_with(place, tools, limits, modest=True) as session:
        served = served_model(session, place, asked.served_name)
        count = asked.concurrency
        answers = ask_server(session, served, task, tools.progress, concurrency=count, kept=kept)
        # The server must still be running: the command may query it.
        environment = {
            "WEIGHTSMITH_URL": f"{session.endpoint.url}/v1",
            "WEIGHTSMITH_MODEL": served.name,
        }
        return score_task(task, answers, tools.command, environment)


def _ask_checkpoint(model: Path, adapters: Sequence[Path], task: Task, tools: Tools) -> Answers:
    read_facts(model)
    weights = [1.0] * len(adapters)
    sources = open_sources(model, adapters, weights, tools.store)
    subject = EvaluatedModel(model=sources.base.tree, adapters=sources.adapters)
    return reference_answers({"model": subject}, task, Unkept(tools), tools)["model"]


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
