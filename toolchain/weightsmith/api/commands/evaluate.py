"""`evaluate`: score an image, a server or a checkpoint on a data file, or by a harness's tasks.

The command line and result files of lm-evaluation-harness are documented at
https://github.com/EleutherAI/lm-evaluation-harness (docs/interface.md, docs/API_guide.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from weightsmith.api.commands.merge import open_sources
from weightsmith.api.commands.requests import EvaluateCommand, Said
from weightsmith.api.commands.server import api_key, served_model, session_with
from weightsmith.api.results import Evaluation
from weightsmith.core.errors import CheckFailed, EnvironmentFailure, InputRefused, UsageError
from weightsmith.core.escape import joined
from weightsmith.core.safe_parse import TOKENIZER, parse_file
from weightsmith.core.trees import below
from weightsmith.core.values import Json, Score, Writable, plain
from weightsmith.evaluating.client import KeptAnswers
from weightsmith.evaluating.contamination import describe_contamination
from weightsmith.evaluating.gate import (
    Rule,
    foreign_faults,
    judge_drop,
    sampled,
    score_interval,
    too_few,
)
from weightsmith.evaluating.items import read_items, sample
from weightsmith.evaluating.likelihood import supports_echo
from weightsmith.evaluating.metrics import check_metric
from weightsmith.evaluating.session import SessionLimits
from weightsmith.evaluating.task import (
    Task,
    ask_server,
    check_program,
    score_task,
    task_with,
)
from weightsmith.evaluating.walks import BUILDER, EvaluatedModel, check_fits, model_task, worded
from weightsmith.models.facts import read_facts
from weightsmith.stages.reference import answers as reference_answers
from weightsmith.steps.destinations import Unkept
from weightsmith.steps.tools import Tools

_SECONDS = 24 * 3600.0
_MAIN = ("exact_match", "acc_norm", "acc", "pass@1", "f1", "bleu")
"""A task's main measure is the first of these that it reports."""


def evaluate_subject(asked: EvaluateCommand, tools: Tools) -> Evaluation:
    """Return how the subject answered and, with `against`, how that compares.

    Raises UsageError for invalid data or options, InputRefused for leaked questions if the task is
    strict, CheckFailed if the server fails or the score is too low.
    """
    _check_subject(asked)
    kept = KeptAnswers(asked.answers) if asked.answers else None
    if asked.model:
        tools.runner.check(BUILDER)
    task = _task(asked, tools)
    before = asked.against or None
    if isinstance(before, str):
        before = _earlier(before)
    tools.progress.stage("evaluate", f"{len(task.items)} questions")
    score = _score(task, asked, tools, kept)
    for fault in foreign_faults(score):
        tools.progress.warn(fault)
    rule = Rule(
        max_drop=1.0 if asked.max_drop is None else asked.max_drop,
        min_score=asked.scoring.min_score,
    )
    verdict = judge_drop("this", score, "other", before, rule)
    if before is not None:
        first, second = ([_request(row) for row in one.per_item] for one in (score, before))
        if first != second:
            raise CheckFailed(
                "the two runs used different questions, or the same in another order",
                hint="compare runs on the same data file",
            )
        if asked.max_drop is not None and (few := too_few(verdict, asked.max_drop)):
            tools.progress.warn(few)
    verdict.require()
    return Evaluation(
        score=score.score,
        n=score.n,
        metric=score.metric,
        interval=score_interval(score),
        per_item=score.per_item,
        figures=score.figures,
        comparison={} if before is None else verdict.facts,
        warnings=tuple(tools.progress.warnings),
    )


def _request(row: Mapping[str, Json]) -> list[Json]:
    """Return all that was asked: conversations may differ in their earlier messages alone."""
    return [row.get(key) for key in ("prompt", "messages", "choices", "tools", "parts")]


def _check_subject(asked: EvaluateCommand) -> None:
    """Raise UsageError if there is not exactly one subject, or a flag that would be ignored."""
    if sum(map(bool, (asked.image, asked.url, asked.model))) != 1:
        raise UsageError(
            "give exactly one of --image, --url and --model",
            hint="--image REF starts an image, --url queries a server, --model loads a checkpoint",
        )
    if asked.adapters and not asked.model:
        hint = "an image has merged weights: remove --adapter, or give --model"
        raise UsageError("--adapter needs --model", hint=hint)
    if asked.tokenizer or asked.include:
        flag = "--tokenizer" if asked.tokenizer else "--include"
        raise UsageError(f"{flag} is for --tasks, and none is given", hint=f"leave out {flag}")
    if asked.max_drop is not None and not asked.against:
        raise UsageError(
            "--max-drop is a drop from an earlier score, and none is given",
            hint="name one with --against, or set a bar with --min-score",
        )
    if asked.model and asked.answers:
        said = "--answers keeps a server's answers, and --model starts none"
        raise UsageError(said, hint="leave it out")
    if asked.model and asked.served_name:
        raise UsageError(
            "--served-name is a model's name on a server, and --model starts none",
            hint="leave it out",
        )


def evaluation_facts(found: Evaluation) -> Mapping[str, Writable]:
    """Return what `evaluate --json` prints."""
    left_out = {"warnings", *([] if found.comparison else ["comparison"])}
    left_out |= set() if found.figures else {"figures"}
    return {key: value for key, value in plain(found).items() if key not in left_out}


def evaluate_text(found: Evaluation) -> str:
    """Return the score with its interval as text, and the comparison's reason below it."""
    low, high = found.interval
    text = f"{found.score:.4f} ({found.metric}, n={found.n}, 95 %: {low:.3f} to {high:.3f})"
    text += "".join(f", {name} {value:.4f}" for name, value in found.figures.items())
    return joined([text, found.comparison["reason"]] if found.comparison else [text])


def _task(asked: EvaluateCommand, tools: Tools) -> Task:
    if asked.data is None:
        raise AssertionError("without tasks, there are questions")
    scoring = asked.scoring
    everything = read_items(asked.data, scoring.metric)
    check_metric(scoring.metric, everything, str(asked.data))
    items = sample(everything, asked.limit)
    if len(items) < len(everything):
        tools.progress.note(sampled(len(items), len(everything)))
    for other in (scoring.training, asked.calibration):
        leaks = describe_contamination(items, Path(other)) if other else ""
        if leaks and scoring.strict:
            raise InputRefused(
                leaks, hint="remove them from one of the two files, or remove --strict"
            )
        if leaks:
            tools.progress.warn(leaks)
    task = task_with(scoring, items, str(asked.data), Path())
    check_program(task)
    return task


def _score(task: Task, asked: EvaluateCommand, tools: Tools, kept: KeptAnswers | None) -> Score:
    if asked.model:
        read_facts(asked.model)
        weights = [1.0] * len(asked.adapters)
        sources = open_sources(asked.model, asked.adapters, weights, tools.store)
        check_fits(task, sources, str(asked.data))
        subject = EvaluatedModel(model=sources.base.tree, adapters=sources.adapters)
        asks, to = worded(task, sources), Unkept(tools)
        answers = reference_answers({"model": subject}, asks, to, tools)["model"]
        similarity = model_task(sources).sentence.similarity
        return score_task(task, answers, tools.command, similarity=similarity)
    if task.pooled in {"label-set", "word-labels"}:
        raise UsageError(
            "a server does not name the labels of words, nor all labels of a text",
            hint="ask a model's folder (--model), or put the suite into a recipe: a build knows its"
            " image's labels",
        )
    image, url = asked.image, asked.url
    limits = SessionLimits(request_seconds=asked.timeout, tries=asked.retries + 1)
    with session_with(tools, limits, image=image, url=url, modest=True) as session:
        # Only a model that chats is asked whether it does.
        may_ask = bool(image) and not task.pooled
        served = served_model(session, asked.served_name, may_ask=may_ask)
        count = asked.concurrency
        answers = ask_server(session, served, task, tools.progress, concurrency=count, kept=kept)
        # The server must still be running: the command may query it.
        url = f"{session.endpoint.url}/v1"
        environment = {"WEIGHTSMITH_URL": url, "WEIGHTSMITH_MODEL": served.name}
        return score_task(task, answers, tools.command, environment)


def _earlier(path: str) -> Score:
    """Return the score from an earlier run's --json output."""
    try:
        data = parse_file(Path(path), largest=TOKENIZER)
        rows = [{**row, "prompt": row["prompt"], "ok": bool(row["ok"])} for row in data["per_item"]]
        number, metric = int(data["n"]), str(data.get("metric", ""))
        return Score(score=float(data["score"]), n=number, metric=metric, per_item=tuple(rows))
    except (OSError, ArithmeticError, ValueError, KeyError, TypeError, AttributeError) as error:
        why = f"{path} is not the output of `evaluate --json`"
        if isinstance(error, OSError):
            why = f"cannot read {path}: {error.strerror}"
        hint = "save one with `evaluate … --json > before.json`"
        raise UsageError(why, hint=hint) from None


def evaluate_tasks(request: EvaluateCommand, tools: Tools) -> Said:
    """Return `{score, n, metric, tasks, per_item}`: the mean of the tasks' main measures; as text.

    Raises UsageError for a checkpoint, EnvironmentFailure if the harness is not installed, and
    CheckFailed with the harness's last lines if it fails, for example on an unknown task.
    """
    if request.run.memory:
        raise UsageError(
            "--memory limits jobs, and --tasks starts none: your own lm_eval asks the server",
            hint="leave out --memory",
        )
    _refuse_other_flags(request)
    image, url = request.image, request.url
    if bool(image) == bool(url):
        raise UsageError(
            "--tasks needs exactly one of --image and --url",
            hint="--image REF starts an image, --url queries a server",
        )
    tools.progress.stage("evaluate", request.tasks)
    session_of = session_with(tools, image=image, url=url, modest=True)
    with session_of as session, tools.scratch() as out:
        served = served_model(session, request.served_name, may_ask=bool(image))
        words = harness_command(request, session.endpoint.url, served.name, out)
        key = api_key() or "none"
        try:
            tools.command(words, {"OPENAI_API_KEY": key}, b"", _SECONDS)
        except EnvironmentFailure:
            raise EnvironmentFailure(
                "lm-evaluation-harness is not installed",
                hint="install it with `pip install 'lm-eval[api]'`",
            ) from None
        except CheckFailed as error:
            if not request.tokenizer or supports_echo(session, served):
                raise
            raise CheckFailed(
                f"{session.endpoint.shown} does not return log-probabilities of a prompt "
                "(llama.cpp's server never does), and tasks that compare likelihoods need "
                f"them; {error.message}",
                hint="use the vLLM image, choose tasks that generate text (without --tokenizer), "
                "or use --data with --metric choice, which works with llama.cpp",
            ) from None
        return read_results(out)


def _refuse_other_flags(request: EvaluateCommand) -> None:
    """Raise UsageError for flags that `--tasks` would ignore."""
    given = {
        "--data": request.data,
        "--answers": request.answers,
        "--against": request.against,
        "--max-drop": request.max_drop is not None,
        "--min-score": request.scoring.min_score,
        "--adapter": request.adapters,
    }
    if flag := next((name for name, value in given.items() if value), ""):
        raise UsageError(
            f"{flag} is for questions of your own, and --tasks names the harness's",
            hint=f"leave out {flag}, or give --data without --tasks",
        )


def harness_command(request: EvaluateCommand, url: str, name: str, out: Path) -> tuple[str, ...]:
    """Return the harness's command line."""
    kind, path = ("local-completions", "completions") if request.tokenizer else (
        "local-chat-completions", "chat/completions"
    )  # fmt: skip
    arguments = f"model={name},base_url={url}/v1/{path},num_concurrent={request.concurrency}"
    arguments += ",max_retries=3"
    if request.tokenizer:
        arguments += f",tokenizer={request.tokenizer},tokenized_requests=False"
    words = ["lm_eval", "--model", kind, "--model_args", arguments, "--tasks", request.tasks]
    words += ["--output_path", str(out), "--seed", "0"]
    words += [] if request.tokenizer else ["--apply_chat_template"]
    words += ["--limit", str(request.limit)] if request.limit else []
    words += ["--include_path", request.include] if request.include else []
    return tuple(words)


def read_results(out: Path) -> Said:
    """Return the harness's newest results, also as text; raise CheckFailed if there are none."""
    files = [path for path in below(out) if path.match("results_*.json")]
    files.sort(key=lambda path: path.stat().st_mtime)
    if not files:
        raise CheckFailed(
            "lm-evaluation-harness wrote no results", hint="run lm_eval by hand and read its output"
        )
    results = parse_file(files[-1], largest=TOKENIZER)
    tasks, lines = dict[str, Mapping[str, Writable]](), list[str]()
    scores, count = list[float](), 0
    for name, measures in results["results"].items():
        numbers = {
            key: value
            for key, value in measures.items()
            if isinstance(value, int | float) and "stderr" not in key
        }
        known = (key for measure in _MAIN for key in numbers if key.split(",")[0] == measure)
        main = next(known, "")
        stderr = measures.get(main.replace(",", "_stderr,", 1)) if main else None
        score = numbers.get(main)
        n = int(results.get("n-samples", {}).get(name, {}).get("effective", 0))
        tasks[name] = {
            "score": score,
            "measure": main,
            "stderr": stderr if isinstance(stderr, int | float) else None,
            "n": n,
            "measures": numbers,
        }
        lines.append(f"{name}: {score} ({main}, n={n})")
        if score is not None:
            scores.append(score)
            count += n
    if not scores:
        raise CheckFailed(
            f"none of the tasks reports a known measure: {', '.join(tasks)}",
            hint=f"known measures: {', '.join(_MAIN)}",
        )
    return {
        "score": sum(scores) / len(scores),
        "n": count,
        "metric": "lm-eval",
        "tasks": tasks,
        "per_item": [],
    }, joined(lines)
